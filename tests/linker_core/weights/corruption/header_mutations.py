"""Spoils the header of a file of weights; the data stays (RELIABILITY A1 to A6)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.linker_core.weights.corruption.files import (
    OTHER,
    SAME,
    Mutation,
    join,
    split,
    weight_files,
)
from tests.linker_core.weights.corruption.nasty import (
    DTYPES,
    INTEGERS,
    NAMES,
    Raw,
    dump,
    near,
    scalar,
)


def _header(change: Callable[[dict[str, Any], random.Random], bool]) -> Mutation:
    """A mutation of one file's header as an object; the data stays."""

    def mutate(folder: Path, rng: random.Random) -> bool:
        file = rng.choice(weight_files(folder))
        text, body = split(file)
        header = json.loads(text)
        differs = change(header, rng)
        join(file, dump(header), body)
        return differs

    mutate.__name__ = change.__name__
    return mutate


def _entry(header: Mapping[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    name = rng.choice([name for name in header if name != "__metadata__"])
    return name, header[name]


def field(header: dict[str, Any], rng: random.Random) -> bool:
    _, entry = _entry(header, rng)
    key = rng.choice(["dtype", "shape", "data_offsets"])
    entry[key] = rng.choice([scalar(rng), near(entry[key], rng)])
    return OTHER


def shape(header: dict[str, Any], rng: random.Random) -> bool:
    _, entry = _entry(header, rng)
    sizes = list(entry["shape"])
    place = rng.randrange(len(sizes))
    choice = rng.randrange(6)
    if choice == 0:
        sizes[place] = scalar(rng)
    elif choice == 1:
        sizes[place] = near(sizes[place], rng)
    elif choice == 2:
        sizes.insert(place, rng.choice([0, 1, 2**62]))
    elif choice == 3:
        sizes = [2 * sizes[0], *sizes[1:-1], sizes[-1] // 2] if len(sizes) > 1 else [sizes[0], 1]
    elif choice == 4:
        sizes.reverse()
    else:
        sizes = [1] * rng.randint(1, 200) + sizes
    square = sizes == entry["shape"]
    entry["shape"] = sizes
    return SAME if square else OTHER


def offsets(header: dict[str, Any], rng: random.Random) -> bool:
    _, entry = _entry(header, rng)
    begin, end = entry["data_offsets"]
    step = rng.choice([1, 2, 4, 8, end - begin, 2**40, 2**63])
    entry["data_offsets"] = rng.choice(
        [[begin + step, end + step], [begin - step, end - step], [end, begin], [begin, end + step],
         [begin - step, end], [begin], [begin, end, end], [0, end - begin], [scalar(rng), end],
         [begin, scalar(rng)], [float(begin), end], {"0": begin, "1": end}]
    )  # fmt: skip
    return SAME


def two_entries(header: dict[str, Any], rng: random.Random) -> bool:
    """Two tensors exchange their places, their whole entries, or share one."""
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.sample(names, 2)
    choice = rng.randrange(3)
    if choice == 0:
        header[a], header[b] = header[b], header[a]
    elif choice == 1:
        header[a]["data_offsets"], header[b]["data_offsets"] = (
            header[b]["data_offsets"],
            header[a]["data_offsets"],
        )
    else:
        header[a]["data_offsets"] = header[b]["data_offsets"]
    return OTHER


def dtype(header: dict[str, Any], rng: random.Random) -> bool:
    _, entry = _entry(header, rng)
    entry["dtype"] = rng.choice([*DTYPES, scalar(rng)])
    return OTHER


def name(header: dict[str, Any], rng: random.Random) -> bool:
    old, entry = _entry(header, rng)
    new = rng.choice([rng.choice(NAMES), rng.choice(list(header)), old[:-1], old + ".weight"])
    del header[old]
    header[new] = entry
    return OTHER


def missing(header: dict[str, Any], rng: random.Random) -> bool:
    gone, entry = _entry(header, rng)
    if rng.random() < 0.5:
        del header[gone]
    else:
        entry.pop(rng.choice(list(entry)))
    return SAME


def extra(header: dict[str, Any], rng: random.Random) -> bool:
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    for number in range(rng.choice([1, 2, 50, 3000])):
        header[rng.choice(NAMES) + ("" if number == 0 else str(number))] = rng.choice(
            [
                {"dtype": "F32", "shape": [0], "data_offsets": [end, end]},
                {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [end, end]},
                {"dtype": "BF16", "shape": [6], "data_offsets": [end - 12, end]},
                scalar(rng),
            ]
        )
    return OTHER


def metadata(header: dict[str, Any], rng: random.Random) -> bool:
    held = header.get("__metadata__") or {}
    nested: Any = 1
    for _ in range(rng.choice([3, 60, 5000])):
        nested = Raw(f"[{dump(nested)}]")
    header["__metadata__"] = rng.choice(
        [scalar(rng), {**held, "format": "x" * 100_000}, {**held, rng.choice(NAMES): scalar(rng)},
         {**held, "deep": nested}, {key: near(value, rng) for key, value in held.items()}, {}]
    )  # fmt: skip
    return SAME


def order(header: dict[str, Any], rng: random.Random) -> bool:
    """The same entries in another order: still the same model."""
    entries = list(header.items())
    rng.shuffle(entries)
    header.clear()
    header.update(entries)
    return SAME


def header_text(folder: Path, rng: random.Random) -> bool:
    """The header's text is spoilt, not its objects."""
    file = rng.choice(weight_files(folder))
    text, body = split(file)
    at = rng.randrange(len(text))
    key = json.dumps(next(iter(json.loads(text))))
    ways: list[str | bytes] = [
        text + " " * rng.randint(1, 5000),
        " " * rng.randint(1, 9) + text,
        text + rng.choice(["\0", "x", "}", "{}", "[]", text]),
        text[:at],
        text[:at] + rng.choice(["\0", '"', "\\", "{", "}", "[", ",", ":", "\n"]) + text[at:],
        text[:at] + text[at + 1 :],
        text[:-1] + f",{key}:" + dump(json.loads(text)[json.loads(key)]) + "}",
        "\ufeff" + text,
        text.encode("utf-16"),
        text.encode("utf-32-le"),
        text[:at].encode() + b"\xff\xfe" + text[at:].encode(),
        "[" * rng.choice([9, 100, 100_000]),
        '{"a":' * 50_000,
        '"' + "a" * 50_000,
        "null", "[]", "{}", "", "0", '""',
    ]  # fmt: skip
    join(file, rng.choice(ways), body)
    return SAME


def header_length(folder: Path, rng: random.Random) -> bool:
    file = rng.choice(weight_files(folder))
    text, body = split(file)
    length, size = len(text.encode()), file.stat().st_size
    lie = rng.choice([length + d for d in (-9, -1, 1, 8)] + [size, size - 8, size - 7, 16 << 20])
    positive = [value for value in INTEGERS if 0 <= value < 2**64]
    join(file, text, body, length=rng.choice([max(0, lie), rng.choice(positive)]))
    return SAME


HEADER: tuple[Mutation, ...] = (
    *map(
        _header, (field, shape, offsets, two_entries, dtype, name, missing, extra, metadata, order)
    ),
    header_text,
    header_length,
)
