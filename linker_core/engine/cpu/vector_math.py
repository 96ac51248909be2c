"""Emits elementary functions of float32, scalars or vectors, by series that need no library.

Each function's result for a number is the same in every lane and whatever the other lanes hold.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llvmlite import ir

from linker_core.engine.cpu.emitter import I32, Emitter, vector

_LOG2_E = 1.0 / math.log(2.0)
# ln 2 in two parts. The first ends in zeros, so that n of them are exact in float32.
_LN2_HIGH = 355.0 / 512.0
_LN2_LOW = math.log(2.0) - _LN2_HIGH
# 1.5 · 2**23: at this size float32 holds whole numbers only, so adding it rounds to one.
_ROUNDER = 12582912.0
# Where e**x leaves float32's normal range, with a little room.
_EXP_MIN, _EXP_MAX = -87.3, 88.72
# Taylor's series of (e**r - 1 - r) / r²; the first term left out, of e**r, is below 2**-27
# where |r| <= ln 2 / 2.
_SERIES = tuple(1.0 / math.factorial(n) for n in range(7, 1, -1))
# Φ(-s) e**(s²/2) as a polynomial in u = 1 / (1 + 0.3 s), highest power first, no constant term:
# least squares of the relative error over 0 <= s <= 14, where it stays below 5e-9.
_NORMAL_TAIL_SCALE = 0.3
_NORMAL_TAIL = (
    *(-0.0208782614, 0.113806516, -0.231400286, 0.195974185, -0.0828475505),
    *(0.0979556973, 0.0777838584, 0.110361191, 0.119557241, 0.119687407),
)


class _Reduced(NamedTuple):
    """x = n ln 2 + r with |r| <= ln 2 / 2."""

    exponent: ir.Value  # n, at the bits where float32 keeps its exponent
    tail: ir.Value  # e**r - 1


def exponential(e: Emitter, x: ir.Value) -> ir.Value:
    """Returns e**x to about one unit in the last place.

    0 where it would be subnormal, infinity above 88.72; a NaN stays one.
    """
    b = e.builder
    lowest, highest = e.constant(_EXP_MIN, x), e.constant(_EXP_MAX, x)
    parts = _reduced(e, e.minimum_float(e.maximum(lowest, x), highest))
    power = b.fadd(parts.tail, e.constant(1.0, x))
    integers = parts.exponent.type
    scaled = b.bitcast(b.add(b.bitcast(power, integers), parts.exponent), x.type)
    # A NaN's own bits may have turned it into a number: it is taken from x.
    above = b.fcmp_unordered(">", x, highest)
    scaled = b.select(above, b.fadd(x, e.constant(math.inf, x)), scaled)
    return b.select(b.fcmp_ordered("<", x, lowest), e.constant(0.0, x), scaled)


def sigmoid(e: Emitter, x: ir.Value) -> ir.Value:
    """Returns 1 / (1 + e**-x)."""
    b = e.builder
    one = e.constant(1.0, x)
    return b.fdiv(one, b.fadd(one, exponential(e, b.fneg(x))))


def normal_cdf(e: Emitter, x: ir.Value) -> ir.Value:
    """Returns Φ(x), the share of the standard normal distribution below x.

    Right to a few units in the last place; below -4 as right as x² is.
    """
    b = e.builder
    one, size = e.constant(1.0, x), e.intrinsic("fabs", x)
    u = b.fdiv(one, e.fma(e.constant(_NORMAL_TAIL_SCALE, x), size, one))
    series = e.constant(_NORMAL_TAIL[0], x)
    for term in _NORMAL_TAIL[1:]:
        series = e.fma(series, u, e.constant(term, x))
    power = exponential(e, b.fmul(b.fmul(x, x), e.constant(-0.5, x)))
    beyond = b.fmul(b.fmul(series, u), power)
    return b.select(b.fcmp_ordered("<", x, e.constant(0.0, x)), beyond, b.fsub(one, beyond))


def tanh(e: Emitter, x: ir.Value) -> ir.Value:
    """Returns the hyperbolic tangent to a few units in the last place.

    tanh |x| = -u / (u + 2) with u = e**(-2 |x|) - 1, which loses nothing near 0.
    """
    b = e.builder
    doubled = b.fmul(e.intrinsic("fabs", x), e.constant(-2.0, x))
    u = _exponential_less_one(e, e.maximum(e.constant(_EXP_MIN, x), doubled))
    size = b.fdiv(b.fneg(u), b.fadd(u, e.constant(2.0, x)))
    return e.intrinsic("copysign", size, x)


def _exponential_less_one(e: Emitter, x: ir.Value) -> ir.Value:
    """Returns e**x - 1 for x from `_EXP_MIN` to 0."""
    b = e.builder
    parts = _reduced(e, x)
    one = e.constant(1.0, x)
    integers = parts.exponent.type
    scale = b.bitcast(b.add(b.bitcast(one, integers), parts.exponent), x.type)
    return e.fma(scale, parts.tail, b.fsub(scale, one))


def _reduced(e: Emitter, x: ir.Value) -> _Reduced:
    b = e.builder
    rounded = e.fma(x, e.constant(_LOG2_E, x), e.constant(_ROUNDER, x))
    n = b.fsub(rounded, e.constant(_ROUNDER, x))
    r = e.fma(n, e.constant(-_LN2_HIGH, x), x)
    r = e.fma(n, e.constant(-_LN2_LOW, x), r)
    series = e.constant(_SERIES[0], x)
    for term in _SERIES[1:]:
        series = e.fma(series, r, e.constant(term, x))
    tail = e.fma(b.fmul(series, r), r, r)
    shift = ir.Constant(I32, 23)
    if isinstance(x.type, ir.VectorType):
        shift = ir.Constant(vector(I32, x.type.count), [23] * x.type.count)
    # The last bits of `rounded` are n in two's complement; what stands above them is shifted out.
    return _Reduced(b.shl(b.bitcast(rounded, shift.type), shift), tail)
