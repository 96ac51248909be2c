"""Bytes, rates and times in the few characters that a terminal has for them."""

from __future__ import annotations

_UNITS = ("B", "K", "M", "G", "T")
_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86400.0
NOTHING = "-"


def of_bytes(count: float | None) -> str:
    """Returns bytes in powers of 1024, as `1.2G`: six characters at most."""
    if count is None:
        return NOTHING
    value, power = float(count), 0
    while abs(value) >= 999.5 and power < len(_UNITS) - 1:  # 1000 would be a character more
        value, power = value / 1024, power + 1
    digits = 0 if power == 0 or abs(value) >= 99.95 else 1
    return f"{value:.{digits}f}{_UNITS[power]}"


def of_rate(per_s: float | None) -> str:
    """Returns a rate per second, with a digit after the point where it is small."""
    if per_s is None:
        return NOTHING
    if per_s >= 10_000:
        return f"{per_s / 1000:.0f}k"
    return f"{per_s:.0f}" if per_s >= 99.5 or per_s == 0 else f"{per_s:.1f}"


def of_ratio(ratio: float | None) -> str:
    """Returns a ratio in per cent."""
    return NOTHING if ratio is None else f"{100 * ratio:.0f}%"


def of_seconds(seconds: float) -> str:
    """Returns a time in its largest unit, as `3m`."""
    if seconds < _MINUTE_S:
        return f"{max(0.0, seconds):.0f}s"
    if seconds < _HOUR_S:
        return f"{seconds // _MINUTE_S:.0f}m"
    if seconds < _DAY_S:
        return f"{seconds // _HOUR_S:.0f}h"
    return f"{seconds // _DAY_S:.0f}d"


def of_nats(nats: float | None, *, beside: float | None = None) -> str:
    """Returns a price or a budget, in as many digits as tell it from the one beside it, 3 to 8."""
    if nats is None:
        return NOTHING
    digits = 3
    while digits < 8 and nats != beside and f"{nats:.{digits}g}" == of_nats(beside):
        digits += 1
    return f"{nats:.{digits}g}"
