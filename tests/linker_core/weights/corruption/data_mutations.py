"""Spoils the bytes of a file of weights, header and data alike (RELIABILITY A2, A3, A11)."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.linker_core.weights.corruption.files import OTHER, SAME, Mutation, split, weight_files


def flip(folder: Path, rng: random.Random) -> bool:
    """Some bytes of prefix, header or data get other values."""
    file = rng.choice(weight_files(folder))
    data = bytearray(file.read_bytes())
    start = 8 + len(split(file)[0].encode())
    inside = rng.choice([range(8), range(8, start), range(start, len(data))])
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.choice(inside)] = rng.choice([0, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    file.write_bytes(data)
    return OTHER


def truncate(folder: Path, rng: random.Random) -> bool:
    file = rng.choice(weight_files(folder))
    size = file.stat().st_size
    text, _ = split(file)
    edges = [0, 1, 7, 8, 9, 8 + len(text), size - 1, size - 2, size // 2, rng.randrange(size)]
    os.truncate(file, rng.choice([min(edge, size) for edge in edges]))
    return SAME


def lengthen(folder: Path, rng: random.Random) -> bool:
    """Bytes behind the end: real ones, or a hole as large as a disk."""
    file = rng.choice(weight_files(folder))
    if rng.random() < 0.3:
        os.truncate(file, rng.choice([1 << 30, 1 << 40, file.stat().st_size + 1]))
        return SAME
    with file.open("ab") as stream:
        stream.write(rng.choice([b"\0", b"#!/bin/sh\n", b"PK\3\4" + bytes(60), bytes(4096)]))
    return SAME


def shift(folder: Path, rng: random.Random) -> bool:
    """Bytes come in or go in the middle; the end may be cut so that the size stays."""
    file = rng.choice(weight_files(folder))
    data = file.read_bytes()
    at, count = rng.randrange(len(data)), rng.choice([1, 2, 4, 64])
    if rng.random() < 0.5:
        changed = data[:at] + rng.randbytes(count) + data[at:]
        file.write_bytes(changed[: len(data)] if rng.random() < 0.5 else changed)
    else:
        file.write_bytes(data[:at] + data[at + count :] + bytes(rng.choice([0, count])))
    return OTHER


def wipe(folder: Path, rng: random.Random) -> bool:
    """The right size and nothing in it, from some point on (a disk that was full)."""
    file = rng.choice(weight_files(folder))
    data = file.read_bytes()
    at = rng.choice([0, 8, rng.randrange(len(data))])
    file.write_bytes(data[:at] + bytes(len(data) - at))
    return OTHER


DATA: tuple[Mutation, ...] = (flip, truncate, lengthen, shift, wipe)
