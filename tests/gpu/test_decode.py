"""The engine's arithmetic on a CUDA device: kernels, graphs, waits and memory."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linker_core.engine.arithmetic import Addend, ByRow, Norm
from linker_core.engine.cuda.arithmetic import CudaArithmetic
from linker_core.engine.devices import arithmetic_for
from linker_core.engine.page_table import PageTable
from linker_core.engine.rows import RowGroup
from linker_core.engine.torch_arithmetic import TorchArithmetic
from linker_core.residency.coding import CodedMatrix
from linker_core.residency.stored import StoredResidual
from tests.linker_core.engine.cuda.attended import CASES, Attended, Case, check_attention
from tests.linker_core.engine.cuda.streams import (
    Stream,
    check_isolation,
    check_mixed_batches,
    forward,
    mixed_family,
)
from tests.linker_core.engine.residuals import residual
from tests.tiny import ARCHITECTURES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
LOGITS_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 8e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)


def launched() -> CudaArithmetic:
    """The device's kernels without graphs."""
    from linker_core.engine.cuda.triton_kernels import TritonKernels  # noqa: PLC0415

    return CudaArithmetic(TritonKernels(num_processors=16), None)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_mixed_steps_over_shuffled_pages_equals_the_definition(
    case: Case, dtype: torch.dtype
) -> None:
    attended = Attended(case, launched(), device=CUDA, dtype=dtype)
    check_attention(attended, tolerance=TOLERANCES[dtype])


@DTYPES
def test_normalize_and_gate_equal_the_definition(dtype: torch.dtype) -> None:
    generator = torch.Generator(CUDA).manual_seed(0)
    both = torch.randn(5, 2 * 4864, generator=generator, device=CUDA, dtype=dtype)
    weights = [torch.randn(4864, generator=generator, device=CUDA).bfloat16() for _ in range(3)]
    labels_T = torch.tensor([2, 0, 1, 1, 2], device=CUDA)
    for by_row in (ByRow(weights, labels_T), ByRow(weights[:1], None)):
        results = []
        for arithmetic in (launched(), TorchArithmetic()):
            x = both.clone()
            arithmetic.normalize(x, by_row, Norm(1e-6, plus_one=True), x)
            arithmetic.gate(x[:, :4864], x[:, 4864:], "gelu_pytorch_tanh")
            results.append(x)
        torch.testing.assert_close(*results, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@DTYPES
@pytest.mark.parametrize(
    "text", ["signs:32", "int2:64", "int3:128", "int4:64", "rank18:8", "rank4:16", "rank9:4"]
)
def test_add_residuals_equals_the_definition_launched_and_replayed(
    text: str, dtype: torch.dtype
) -> None:
    deltas = [residual_on(CUDA, residual(text, 1000, 904, seed=seed)) for seed in (1, 2)]
    x_TI = torch.empty(24, 904, device=CUDA, dtype=dtype)
    rows = [torch.tensor([3, 20], device=CUDA), torch.arange(4, 20, device=CUDA)]
    groups = [RowGroup(numbers, None) for numbers in rows]
    y_TO = torch.empty(24, 1000, device=CUDA, dtype=dtype)
    addends = [Addend(delta, group, y_TO) for delta, group in zip(deltas, groups, strict=True)]
    arithmetic = arithmetic_for(CUDA)
    for seed in range(4):
        generator = torch.Generator(CUDA).manual_seed(seed)
        x_TI.copy_(torch.randn(24, 904, generator=generator, device=CUDA))
        y_TO.zero_()
        arithmetic.run("key", lambda: arithmetic.add_residuals(x_TI, addends))
        for delta, numbers in zip(deltas, rows, strict=True):
            want_nO = x_TI[numbers].double() @ delta.delta().double().T
            off = (y_TO[numbers].double() - want_nO).abs().max() / want_nO.abs().max()
            assert float(off) <= TOLERANCES[dtype]
        assert not y_TO[[0, 1, 2, 21, 22, 23]].any()


def residual_on(device: torch.device, delta: StoredResidual) -> StoredResidual:
    """Returns a delta with its codes on a device."""

    def moved(matrix: CodedMatrix | None) -> CodedMatrix | None:
        if matrix is None:
            return None
        codes_RB, scales_RG = (part.to(device) for part in matrix.tensors)
        return replace(matrix, codes_RB=codes_RB, scales_RG=scales_RG)

    return replace(
        delta,
        dense=moved(delta.dense),
        down=moved(delta.down),
        up=moved(delta.up),
        extra=delta.extra.to(device),
    )


@DTYPES
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_gives_each_variants_own_logits(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    family, base = mixed_family(
        tmp_path, architecture, arithmetic_for(CUDA), device=CUDA, dtype=dtype
    )
    check_mixed_batches(family, base, tolerance=LOGITS_TOLERANCES[dtype])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_replayed_steps_equal_launched_ones_bit_for_bit(
    tmp_path: Path, architecture: str
) -> None:
    families = [
        mixed_family(tmp_path / name, architecture, arithmetic, device=CUDA, dtype=torch.bfloat16)[
            0
        ]
        # The same kernels, so that histories are split alike.
        for name, arithmetic in (("a", without_graphs()), ("b", arithmetic_for(CUDA)))
    ]
    for turn in range(3):
        # Other sequences on other pages in the same slots.
        for family in families:
            assert family.cache.grow(PageTable(), 4 * (turn + 1))
        both = [[Stream(f, n, seed=10 * turn + n) for n in range(5)] for f in families]
        for lengths in ([3, 4, 1, 4, 2], *[[1] * 5] * 4):
            want_RV, got_RV = (forward(streams, lengths) for streams in both)
            assert torch.equal(want_RV, got_RV)


def without_graphs() -> CudaArithmetic:
    from linker_core.engine.cuda.triton_kernels import TritonKernels  # noqa: PLC0415

    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    return CudaArithmetic(TritonKernels(num_processors=processors), None)


def test_forward_keeps_what_is_not_finite_to_its_own_sequence(tmp_path: Path) -> None:
    family, _ = mixed_family(
        tmp_path, "qwen2", arithmetic_for(CUDA), device=CUDA, dtype=torch.bfloat16
    )
    check_isolation(family)


def test_forward_waits_for_the_device_once_at_its_end(tmp_path: Path) -> None:
    family, _ = mixed_family(
        tmp_path, "gemma2", arithmetic_for(CUDA), device=CUDA, dtype=torch.bfloat16
    )
    streams = [Stream(family, n, seed=n) for n in range(5)]
    # Compiled, captured and replayed once before: what is made only once may wait.
    for lengths in ([3, 4, 1, 4, 2], *[[1] * 5] * 3):
        forward(streams, lengths)
    for lengths in ([3, 4, 1, 4, 2], [1] * 5):
        assert count_waits(streams, lengths) == 1


def count_waits(streams: list[Stream], lengths: list[int]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            forward(streams, lengths)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


def test_graphs_take_no_memory_that_grows_and_give_it_back(tmp_path: Path) -> None:
    arithmetic = arithmetic_for(CUDA)
    family, _ = mixed_family(tmp_path, "qwen2", arithmetic, device=CUDA, dtype=torch.bfloat16)
    streams = [Stream(family, n, seed=n) for n in range(5)]
    forward(streams, [2] * 5)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held = []
    for step in range(20):
        forward(streams, [1] * 5)
        torch.cuda.synchronize()
        if step >= 3:
            held.append(torch.cuda.memory_allocated())
    assert len(set(held)) == 1
    arithmetic.forget()
    torch.cuda.synchronize()
    # A product's workspace on the stream of captures stays.
    assert torch.cuda.memory_allocated() - before <= 64 * 2**20
