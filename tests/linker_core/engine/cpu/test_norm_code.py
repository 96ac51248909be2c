from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from llvmlite import ir

from linker_core.engine.cpu.norm_code import TASK, NormSpec, emit_norm
from linker_core.engine.cpu.regions import Code
from tests.linker_core.engine.cpu.compiled import compiled, record, run

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_EPS = 1e-6


def _spec(dtype: str = "F32", *, plus_one: bool = False, lanes: int = 16) -> NormSpec:
    return NormSpec(dtype=dtype, plus_one=plus_one, lanes=lanes)


@cache
def _code(spec: NormSpec) -> Code:
    def emit(module: ir.Module) -> None:
        emit_norm(module, spec)

    return compiled(emit)


def _normalise(
    x_TI: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    *,
    spec: NormSpec,
    rows: Sequence[int] | None = None,
    num_parts: int = 1,
    out_TI: torch.Tensor | None = None,
    num_threads: int = 1,
) -> torch.Tensor:
    """Runs the kernel; rows that are not named keep what `out_TI` holds.

    `weight` is that of all rows, or one for each that is named.
    """
    weights = [weight] if isinstance(weight, torch.Tensor) else list(weight)
    by_row = len(weights) > 1
    addresses = np.array([w.data_ptr() for w in weights], dtype=np.int64)
    out_TI = torch.zeros_like(x_TI) if out_TI is None else out_TI
    numbers = np.array(range(len(x_TI)) if rows is None else rows, dtype=np.int64)
    task = record(
        TASK,
        x=x_TI.data_ptr(),
        x_stride=x_TI.stride(0),
        out=out_TI.data_ptr(),
        out_stride=out_TI.stride(0),
        rows=numbers.ctypes.data,
        num_rows=len(numbers),
        num_parts=num_parts,
        width=len(weights[0]),
        weight=addresses.ctypes.data if by_row else weights[0].data_ptr(),
        weight_by_row=int(by_row),
        eps=_EPS,
    )
    run(_code(spec), spec.symbol, task, num_threads=num_threads)
    return out_TI


def _reference(x_TI: torch.Tensor, weight: torch.Tensor, *, plus_one: bool) -> torch.Tensor:
    x, factor = x_TI.double(), weight.double() + plus_one
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * factor


@pytest.mark.parametrize("width", [1, 5, 16, 24, 64, 99, 896])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", list(_DTYPES))
def test_norm_of_any_width_and_weight_is_the_formula(
    dtype: str, plus_one: bool, width: int
) -> None:
    torch.manual_seed(width)
    x_TI, weight = torch.randn(3, width) * 3, torch.randn(width).to(_DTYPES[dtype])
    found = _normalise(x_TI, weight, spec=_spec(dtype, plus_one=plus_one))
    expected = _reference(x_TI, weight, plus_one=plus_one)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_norm_in_any_vector_width_is_the_formula(lanes: int) -> None:
    torch.manual_seed(lanes)
    x_TI, weight = torch.randn(4, 60), torch.randn(60)
    found = _normalise(x_TI, weight, spec=_spec(lanes=lanes))
    expected = _reference(x_TI, weight, plus_one=False)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_named_rows_are_read_and_written_where_they_lie() -> None:
    torch.manual_seed(0)
    x_TI, weight = torch.randn(6, 40), torch.randn(40)
    out_TI = torch.full((6, 50), 7.0)[:, :40]
    _normalise(x_TI, weight, spec=_spec(), rows=[4, 1], out_TI=out_TI)
    every = _normalise(x_TI, weight, spec=_spec())
    assert torch.equal(out_TI[[1, 4]], every[[1, 4]])
    assert (out_TI[[0, 2, 3, 5]] == 7.0).all()


def test_parts_of_a_row_are_normalised_alone_and_in_place() -> None:
    torch.manual_seed(0)
    buffer, weight = torch.randn(5, 100), torch.randn(24)
    heads = buffer[:, 8:80]
    expected = _normalise(heads.reshape(15, 24).clone(), weight, spec=_spec())
    before = buffer.clone()
    _normalise(heads, weight, spec=_spec(), num_parts=3, out_TI=heads)
    assert torch.equal(heads.reshape(15, 24), expected)
    assert torch.equal(buffer[:, :8], before[:, :8])
    assert torch.equal(buffer[:, 80:], before[:, 80:])


def test_each_named_row_takes_its_own_weight() -> None:
    torch.manual_seed(0)
    x_TI, weights = torch.randn(6, 36), list(torch.randn(3, 36))
    found = _normalise(x_TI, weights, spec=_spec(), rows=[5, 0, 2], num_parts=1, num_threads=2)
    halves = _normalise(x_TI, [w[:18] for w in weights], spec=_spec(), rows=[5, 0, 2], num_parts=2)
    for row, weight in zip((5, 0, 2), weights, strict=True):
        assert torch.equal(found[row], _normalise(x_TI, weight, spec=_spec())[row])
        parts = _normalise(x_TI[row].view(2, 18), weight[:18], spec=_spec())
        assert torch.equal(halves[row], parts.flatten())


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_a_row_is_the_same_in_every_batch_and_on_every_thread(
    num_rows: int, num_threads: int
) -> None:
    torch.manual_seed(0)
    x_TI, weight = torch.randn(7, 99), torch.randn(99)
    alone = torch.cat([_normalise(x_TI[i : i + 1], weight, spec=_spec()) for i in range(7)])
    found = _normalise(x_TI[:num_rows].clone(), weight, spec=_spec(), num_threads=num_threads)
    assert torch.equal(found, alone[:num_rows])


def test_a_row_that_is_not_a_number_leaves_the_others() -> None:
    torch.manual_seed(0)
    x_TI, weight = torch.randn(3, 40), torch.randn(40)
    good = _normalise(x_TI, weight, spec=_spec())
    x_TI[1, 3] = float("nan")
    found = _normalise(x_TI, weight, spec=_spec())
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("width", [5, 21])
def test_nothing_behind_a_weights_last_word_is_read(width: int) -> None:
    words = torch.frombuffer(mmap.mmap(-1, 2 * mmap.PAGESIZE), dtype=torch.bfloat16)
    weight = words[mmap.PAGESIZE // 2 - width : mmap.PAGESIZE // 2]
    weight.copy_(torch.linspace(-1, 1, width))
    no_access = 0  # PROT_NONE: the process would end here
    behind = ctypes.c_void_p(words.data_ptr() + mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(behind, mmap.PAGESIZE, no_access) == 0
    x_TI = torch.randn(2, width)
    found = _normalise(x_TI, weight, spec=_spec("BF16"))
    expected = _reference(x_TI, weight, plus_one=False)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
