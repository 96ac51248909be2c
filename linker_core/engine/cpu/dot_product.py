"""How a block of a weight's words is multiplied with a block of x, with and without bfloat16 units.

float32 comes in and goes out. `Widened` turns the words into float32 and computes in it. `Rounded`
leaves bfloat16 words as they are and rounds x to bfloat16; products and sums are float32.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from llvmlite import ir

from linker_core.engine.cpu.emitter import F32, I16, Emitter, vector
from linker_core.engine.cpu.widening import element_of, load_part_widened, load_widened


class DotProduct(Protocol):
    """Sums products lane by lane."""

    @property
    def block(self) -> int:
        """Elements of a row that one step takes."""

    @property
    def packed(self) -> ir.Type:
        """What an element of x is packed as, four bytes at most."""

    def pack(self, e: Emitter, x: ir.Value, target: ir.Value) -> None:
        """Writes a block of x, a float32 vector, to where `add` is to read it."""

    def load(self, e: Emitter, words: ir.Value) -> ir.Value:
        """Reads a block of a weight's words."""

    def load_part(self, e: Emitter, words: ir.Value, count: ir.Value) -> ir.Value:
        """Reads the `count` words that are left of a row, and zeros."""

    def add(self, e: Emitter, total: ir.Value, words: ir.Value, x: ir.Value) -> ir.Value:
        """Returns `total` with the products added; `x` is the address of a packed block."""


class Widened:
    """Words of any type, widened to float32.

    Args:
        dtype: The words' type as safetensors names it.
        lanes: float32 elements of a vector.
    """

    def __init__(self, dtype: str, lanes: int) -> None:
        self._dtype, self._lanes = dtype, lanes

    @property
    def block(self) -> int:
        return self._lanes

    @property
    def packed(self) -> ir.Type:
        return F32

    def pack(self, e: Emitter, x: ir.Value, target: ir.Value) -> None:
        e.store(x, target)

    def load(self, e: Emitter, words: ir.Value) -> ir.Value:
        return load_widened(e, words, self._dtype, self._lanes)

    def load_part(self, e: Emitter, words: ir.Value, count: ir.Value) -> ir.Value:
        return load_part_widened(e, words, self._dtype, count, self._lanes)

    def add(self, e: Emitter, total: ir.Value, words: ir.Value, x: ir.Value) -> ir.Value:
        return e.fma(words, e.load(x, vector(F32, self._lanes)), total)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


BFLOAT: Final = _BFloat()


class Rounded:
    """bfloat16 words and a CPU that multiplies bfloat16 pairs into float32 sums (AVX512_BF16)."""

    _LANES = 16
    _PAIRS: Any = vector(BFLOAT, 2 * _LANES)

    @property
    def block(self) -> int:
        return 2 * self._LANES

    @property
    def packed(self) -> ir.Type:
        return I16

    def pack(self, e: Emitter, x: ir.Value, target: ir.Value) -> None:
        b = e.builder
        e.store(b.bitcast(b.fptrunc(x, self._PAIRS), vector(I16, self.block)), target)

    def load(self, e: Emitter, words: ir.Value) -> ir.Value:
        return e.builder.bitcast(e.load(words, vector(I16, self.block)), self._PAIRS)

    def load_part(self, e: Emitter, words: ir.Value, count: ir.Value) -> ir.Value:
        part = e.load_part(words, element_of("BF16"), count, self.block)
        return e.builder.bitcast(part, self._PAIRS)

    def add(self, e: Emitter, total: ir.Value, words: ir.Value, x: ir.Value) -> ir.Value:
        pairs = self.load(e, x)
        return e.call_named("llvm.x86.avx512bf16.dpbf16ps.512", total, words, pairs)
