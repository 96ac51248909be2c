"""A reader written from docs/delta.md alone, in numpy, agrees with what is served."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.torch import load_file

from linker_core.residency.stored import StoredResidual, StoredTensor
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.rungs import parse_rung
from linker_core.weights.keys import LM_HEAD_NAME
from tests.linker_core.residency.deltas import RESIDUALS, encoded, matrices, write_planned
from tests.tiny import make_checkpoint, make_variant

Array = npt.NDArray[np.float32]
_HALF_3 = (0.2451171875, 0.7578125, 1.34375, 2.15625)
_HALF_4 = (
    0.1279296875, 0.388671875, 0.65625, 0.94140625, 1.2578125, 1.6171875, 2.0625, 2.734375
)  # fmt: skip
LEVELS = {
    1: [-1.0, 1.0],
    2: [-1.5078125, -0.453125, 0.453125, 1.5078125],
    3: [*(-level for level in reversed(_HALF_3)), *_HALF_3],
    4: [*(-level for level in reversed(_HALF_4)), *_HALF_4],
}
BITS = {"signs": 1, "int2": 2, "int3": 3, "int4": 4}


class Reader:
    """Reads one file."""

    def __init__(self, path: Path) -> None:
        content = (path / "delta.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        self.header: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.data = content[8 + length :]
        self.plan = json.loads(self.header["__metadata__"]["plan"])

    def words(self, name: str) -> npt.NDArray[np.uint8]:
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        words = np.frombuffer(self.data[begin:end], np.uint8)
        return words.reshape(entry["shape"][0], -1)

    def bfloat16(self, words: npt.NDArray[np.uint8]) -> Array:
        halves = np.ascontiguousarray(words).view("<u2")
        return (halves.astype(np.uint32) << 16).view(np.float32)

    def matrix(self, stem: str, bits: int, group: int | None, width: int) -> Array:
        words = self.words(f"{stem}.codes")
        if bits == 16:
            return self.bfloat16(words)
        scales = self.bfloat16(self.words(f"{stem}.scales"))
        if bits == 8:
            values = words.view(np.int8)[:, :width].astype(np.float32)
        else:
            values = np.array(LEVELS[bits], np.float32)[codes_of(words, bits)[:, :width]]
        return values * np.repeat(scales, group or width, axis=1)[:, :width]

    def delta(self, name: str, rows: int, width: int) -> Array:
        rung = self.plan["rungs"][name]
        total = np.zeros((rows, width), np.float32)
        if found := re.search(r"(signs|int\d):(\d+)", rung):
            total += self.matrix(f"{name}.dense", BITS[found[1]], int(found[2]), width)
        if found := re.search(r"rank\d+:(\d+)", rung):
            bits = int(found[1])
            group = 64 if bits == 4 else None
            down = self.matrix(f"{name}.down", bits, group, width)
            up = self.matrix(f"{name}.up", bits, group, rows)
            total += up.T @ down
        return total


def codes_of(words: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Element by element, as the text says it."""
    if bits == 3:
        runs = words.reshape(len(words), -1, 48)
        low = codes_of(runs[:, :, :32].reshape(len(words), -1), 2)
        high = codes_of(runs[:, :, 32:].reshape(len(words), -1), 1)
        return np.asarray(low | (high << 2), np.uint8)
    per_chunk = 128 // bits
    count = words.shape[1] * 8 // bits
    codes = np.zeros((len(words), count), np.uint8)
    for element in range(count):
        chunk, place = divmod(element, per_chunk)
        byte = words[:, 16 * chunk + place % 16]
        codes[:, element] = (byte >> (bits * (place // 16))) & (2**bits - 1)
    return codes


@pytest.mark.parametrize("rung", RESIDUALS)
def test_reader_of_the_document_decodes_what_is_served(tmp_path: Path, rung: str) -> None:
    """Matrices whose widths are no multiple of a run, and rows that the donor lacks."""
    donor_path = make_checkpoint(tmp_path / "donor", tie=False, layers=1, intermediate=150)
    variant_path = make_variant(
        tmp_path / "variant", donor_path, scale=0.05, added_tokens=["<new>", "<newer>"]
    )
    parsed = parse_rung(rung)
    rungs = dict.fromkeys(matrices(variant_path), parsed)
    write_planned(donor_path, variant_path, tmp_path / "delta", rungs)
    reader = Reader(tmp_path / "delta")
    base = load_file(donor_path / "model.safetensors")
    whole = load_file(variant_path / "model.safetensors")
    for name in rungs:
        served = encoded(StoredTensor(tensor=base[name]), whole[name], name, parsed)  # type: ignore[arg-type]
        assert isinstance(served, StoredResidual)
        rows, width = base[name].shape
        found = reader.delta(name, rows, width)
        np.testing.assert_allclose(found, served.delta().numpy(), rtol=1e-5, atol=1e-7)
    extra = reader.bfloat16(reader.words(f"{LM_HEAD_NAME}.extra"))
    assert np.array_equal(extra, whole[LM_HEAD_NAME][-2:].float().numpy())
    with DeltaFile.open(tmp_path / "delta") as delta:
        assert delta.plan.to_json() == reader.plan
