"""Products run on records written by hand.

Legend: T rows of x, I input features, O output features.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from llvmlite import ir

from linker_core.engine.cpu.dot_product import DotProduct, Rounded, Widened
from linker_core.engine.cpu.product_code import (
    JOB,
    PIECE_ROWS,
    TASK,
    Tiling,
    emit_product,
    packed_elements,
)
from linker_core.engine.cpu.regions import Code
from tests.linker_core.engine.cpu.compiled import compiled, record, run

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TILINGS = {
    16: Tiling(lanes=16, num_registers=32, panel_rows=6),
    8: Tiling(lanes=8, num_registers=16, panel_rows=4),
    4: Tiling(lanes=4, num_registers=16, panel_rows=4),
}
_NO_ACCESS = 0  # PROT_NONE: the process would end here
_MARK = 7.0


@dataclass
class Weight:
    """One weight of a task, with nothing, one bias, or a bias for each row."""

    words_OI: torch.Tensor
    bias: torch.Tensor | Sequence[torch.Tensor] | None = None

    def bias_of(self, row: int) -> torch.Tensor | None:
        if self.bias is None or isinstance(self.bias, torch.Tensor):
            return self.bias
        return self.bias[row]


@cache
def _code(dtype: str, lanes: int, *, rounded: bool) -> Code:
    dot: DotProduct = Rounded() if rounded else Widened(dtype, lanes)

    def emit(module: ir.Module) -> None:
        emit_product(module, dot, dtype=dtype, tiling=TILINGS[lanes])

    return compiled(emit)


def multiply(
    x_TI: torch.Tensor,
    weights: Sequence[Weight],
    *,
    rows: Sequence[int] | None = None,
    lanes: int = 16,
    rounded: bool = False,
    num_threads: int = 1,
) -> list[torch.Tensor]:
    """Returns x Wᵀ + b of each weight [T, O].

    All outputs are parts of one wider buffer; whatever is not written keeps a mark, which is
    checked between and behind the outputs.
    """
    numbers = np.array(range(len(x_TI)) if rows is None else rows, np.int64)
    width, dtype = x_TI.shape[1], _NAMES[weights[0].words_OI.dtype]
    outs = [len(weight.words_OI) for weight in weights]
    buffer = torch.full((len(x_TI), sum(outs) + 3 * len(outs)), _MARK)
    jobs: list[int] = []
    ys: list[torch.Tensor] = []
    kept: list[np.ndarray] = []
    first = pieces = 0
    for weight, num_out in zip(weights, outs, strict=True):
        y_TO = buffer[:, first : first + num_out]
        bias = 0
        by_row = weight.bias is not None and not isinstance(weight.bias, torch.Tensor)
        if isinstance(weight.bias, torch.Tensor):
            bias = weight.bias.data_ptr()
        elif weight.bias is not None:
            kept.append(np.array([one.data_ptr() for one in weight.bias], np.int64))
            bias = kept[-1].ctypes.data
        jobs += record(
            JOB,
            weight=weight.words_OI.data_ptr(),
            y=y_TO.data_ptr(),
            y_stride=y_TO.stride(0),
            num_out=num_out,
            first_piece=pieces,
            bias=bias,
            bias_by_row=int(by_row),
        )
        ys.append(y_TO)
        first += num_out + 3
        pieces += -(-num_out // PIECE_ROWS)
    job_words = np.array([*jobs, *record(JOB, first_piece=1 << 62)], np.int64)
    room = packed_elements(
        TILINGS[lanes], num_rows=len(numbers), width=width, num_threads=num_threads
    )
    packed = torch.full((room + 1,), _MARK)
    task = record(
        TASK,
        x=x_TI.data_ptr(),
        x_stride=x_TI.stride(0),
        rows=numbers.ctypes.data,
        num_rows=len(numbers),
        width=width,
        packed=packed.data_ptr(),
        num_pieces=pieces,
        jobs=job_words.ctypes.data,
    )
    run(_code(dtype, lanes, rounded=rounded), "product", task, num_threads=num_threads)
    assert packed[-1] == _MARK
    between = torch.ones(buffer.shape[1], dtype=torch.bool)
    for y_TO in ys:
        between[y_TO.storage_offset() : y_TO.storage_offset() + y_TO.shape[1]] = False
    assert (buffer[:, between] == _MARK).all()
    assert (buffer[sorted(set(range(len(x_TI))) - set(numbers.tolist()))] == _MARK).all()
    return ys


def exact(x_TI: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Returns x Wᵀ + b in float64."""
    y_TO = x_TI.double() @ weight.words_OI.double().T
    for row in range(len(y_TO)):
        bias_O = weight.bias_of(row)
        if bias_O is not None:
            y_TO[row] += bias_O.double()
    return y_TO


def size_of_terms(x_TI: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Returns Σ |x w| of each output, which its rounding errors are a small part of."""
    return x_TI.double().abs() @ weight.words_OI.double().abs().T


def before_an_unreadable_page(words: torch.Tensor) -> torch.Tensor:
    """Returns a copy whose last word is the last that may be read."""
    size = -(-words.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = torch.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), dtype=words.dtype)
    end = size // words.element_size()
    copy = room[end - words.numel() : end].view(words.shape)
    copy.copy_(words)
    behind = ctypes.c_void_p(room.data_ptr() + size)
    assert ctypes.CDLL(None).mprotect(behind, mmap.PAGESIZE, _NO_ACCESS) == 0
    return copy
