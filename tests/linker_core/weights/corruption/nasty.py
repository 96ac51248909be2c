"""Values that readers of untrusted files stumble over, and JSON that holds them as they are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NAMES = (
    "", ".", "..", "../../etc/passwd", "/dev/zero", "a/b", "a\x00b", "a\nb", "a\r\nb", "x" * 10_000,
    "__metadata__", "__class__", "model", "ﬁle", "\u202emodel", "\ud800", "𝔪odel", "%s%n", "{0}",
    "model.layers.-1.mlp.up_proj.weight", "model.layers.00.mlp.up_proj.weight",
    "model.layers.99999.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight ",
    "MODEL.NORM.WEIGHT", "model..norm.weight", "lm_head.weight", "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.embed_tokens.weight",
)  # fmt: skip
DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "I8", "U8", "I64", "BOOL", "bf16", "", "C64")
INTEGERS = (
    -(2**63), -1, 0, 1, 2, 3, 7, 127, 255, 256, 2**16, 2**22, 2**22 + 1, 2**24, 2**31 - 1, 2**31,
    2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**19, 10**30, 10**400,
)  # fmt: skip


class Raw(str):
    """Text that goes into a JSON document as it is."""

    __slots__ = ()


LITERALS = tuple(
    Raw(text)
    for text in (
        "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "-0", "-0.0", "0.0", "1.0",
        "1e3", "01", "1.", ".5", "+1", "0x10", "1_000", "tru", "nul", "'a'", '"\\ud800"',
        '"\\u0000"', '"\\x41"', "[" * 300 + "]" * 300, '{"a":1,"a":2}', "[1,]", "{,}", "//",
    )
)  # fmt: skip


def scalar(rng: random.Random) -> Any:
    """A JSON value of any kind, likely a number."""
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(INTEGERS),
        lambda: rng.choice(INTEGERS),
        lambda: rng.randint(-5, 5000),
        lambda: rng.choice([0.0, -0.5, 1e-45, 1e30, 1e308, 0.5, 3.0]),
        lambda: rng.choice([True, False, None]),
        lambda: rng.choice(LITERALS),
        lambda: rng.choice(NAMES),
        lambda: rng.choice([[], {}, [[]], [None], {"a": []}, [1, "1"], ["x"] * 2000]),
    ]
    return rng.choice(kinds)()


def near(value: Any, rng: random.Random) -> Any:
    """A value that is a little off, or of another type that looks the same."""
    if isinstance(value, bool) or value is None:
        return rng.choice([True, False, None, 0, 1, "true", "null"])
    if isinstance(value, int):
        return rng.choice(
            [value + 1, value - 1, value * 2, value // 2, -value, value << 32, float(value),
             str(value), [value], Raw(f"{value}.0"), Raw(f"{value}e0"), Raw(f"0{value}")]
        )  # fmt: skip
    if isinstance(value, float):
        return rng.choice([value * 10, -value, value + 1e-9, str(value), int(value), 1 / 3])
    if isinstance(value, str):
        odd = f"\0{value}"
        return rng.choice([value.upper(), f"{value} ", value[:-1], [value], value * 2, odd])
    if isinstance(value, list):
        return rng.choice([value[:-1], value[::-1], [*value, *value[:1]], value * 2, [value], None])
    return rng.choice([None, [], {**value, "x": 1}, dict(list(value.items())[:-1]), [value]])


def dump(value: Any) -> str:
    """JSON with `Raw` parts as they are; numbers of any size."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(dump, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**300:
        return "1" + "0" * 400
    return json.dumps(value)
