"""Every kernel, in Triton's interpreter, against its definition. `test_kernels.py` runs this.

bfloat16 is left to the tests on a device: the interpreter multiplies its words as whole numbers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linker_core.engine.arithmetic import Addend, ByRow, Norm
from linker_core.engine.cuda.arithmetic import CudaArithmetic
from linker_core.engine.cuda.triton_kernels import TritonKernels
from linker_core.engine.rows import RowGroup
from linker_core.engine.torch_arithmetic import TorchArithmetic
from tests.linker_core.engine.cuda.attended import CASES, Attended, Case, check_attention
from tests.linker_core.engine.cuda.streams import (
    check_isolation,
    check_mixed_batches,
    mixed_family,
)
from tests.linker_core.engine.residuals import assert_added, residual

CPU = torch.device("cpu")


def kernels(num_processors: int = 1) -> TritonKernels:
    return TritonKernels(num_processors=num_processors)


def random(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_mixed_steps_over_shuffled_pages_equals_the_definition(case: Case) -> None:
    arithmetic = CudaArithmetic(kernels(), None)
    attended = Attended(case, arithmetic, device=CPU, dtype=torch.float32)
    check_attention(attended, tolerance=1e-5)


@pytest.mark.parametrize("case", CASES[3:5], ids=str)
def test_attend_histories_in_parts_equals_the_definition(case: Case) -> None:
    # Eight parts for one row, four for three; the window leaves some of them empty.
    arithmetic = CudaArithmetic(kernels(num_processors=8), None)
    attended = Attended(case, arithmetic, device=CPU, dtype=torch.float32)
    check_attention(attended, tolerance=1e-5)


def test_attend_half_precision_rounds_what_it_stores_and_no_score() -> None:
    case = Case(group=7, head_dim=64, window=24, softcap=5.0)
    arithmetic = CudaArithmetic(kernels(), None)
    attended = Attended(case, arithmetic, device=CPU, dtype=torch.float16)
    check_attention(attended, tolerance=4e-3)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalize_weights_by_row_equals_the_definition(dtype: torch.dtype, plus_one: bool) -> None:
    x_TX = random(5, 4 * 24)[:, 24:72]  # rows that are not dense, two runs each
    weights = [random(24, seed=n, dtype=dtype) for n in (1, 2, 3)]
    norm = Norm(1e-6, plus_one)
    for by_row in (
        ByRow(weights, torch.tensor([2, 0, 1, 1, 2])),
        ByRow(weights[:1], None),
        ByRow([weights[0], weights[1].double().float()], torch.tensor([1, 0, 1, 1, 0])),
    ):
        got, want = torch.full((5, 48), 7.0), torch.empty(5, 48)
        kernels().normalize(x_TX, by_row, norm, got)
        TorchArithmetic().normalize(x_TX, by_row, norm, want)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gate_rows_of_a_shared_buffer_equals_the_definition(activation: str) -> None:
    both = random(3, 2 * 1100) * 20.0
    want = both.clone()
    kernels().gate(both[:, :1100], both[:, 1100:], activation)
    TorchArithmetic().gate(want[:, :1100], want[:, 1100:], activation)
    torch.testing.assert_close(both, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        *("signs:32", "int2:64", "int3:128", "int4:64", "int4:256"),
        *("rank3:4", "rank18:8", "rank7:16", "rank4:8+signs:64"),
    ],
)
def test_add_residuals_of_mixed_rows_equals_float64(text: str) -> None:
    x_TI = random(40, 136, seed=0)[::2]
    x_TI[[0, 19]] = torch.nan  # nobody's
    buffer = random(20, 75 + 33 + 2, seed=1)
    before = buffer.clone()
    many = list(range(1, 19))
    rows = [RowGroup(torch.tensor(one), None) for one in ([3], [1, 5, 18], many)]
    places = [slice(1, 76), slice(1, 76), slice(77, 110)]
    addends = [
        Addend(residual(text, place.stop - place.start, 136, seed=n), group, buffer[:, place])
        for n, (group, place) in enumerate(zip(rows, places, strict=True))
    ]
    launched = kernels()
    for _ in range(2):  # the second time with tables that are there
        buffer.copy_(before)
        launched.add_residuals(x_TI, addends)
        for addend, place in zip(addends, places, strict=True):
            kept = addend.y_TO.clone()
            kept[addend.rows.indices_n] = before[:, place][addend.rows.indices_n]
            assert_added(x_TI, [addend], [kept])
        assert torch.equal(buffer[[0, 19]], before[[0, 19]])
        assert torch.equal(buffer[:, [0, 76]], before[:, [0, 76]])


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])  # norms of heads; all the rest
def test_forward_over_the_kernels_gives_each_variants_own_logits(
    tmp_path: Path, architecture: str
) -> None:
    arithmetic = CudaArithmetic(kernels(), None)
    check_mixed_batches(*mixed_family(tmp_path, architecture, arithmetic))


def test_forward_over_the_kernels_keeps_what_is_not_finite_to_its_own_sequence(
    tmp_path: Path,
) -> None:
    family, _ = mixed_family(tmp_path, "qwen2", CudaArithmetic(kernels(), None))
    check_isolation(family)
