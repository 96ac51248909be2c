from __future__ import annotations

from pathlib import Path

import pytest

from linker_core.sharing.rungs import Residual, parse_rung, residual_bytes
from linker_core.weights.checkpoint import Checkpoint
from server.cli.bench.encode import RUNGS, measure
from tests.tiny import make_checkpoint, make_variant


def test_measure_encodes_every_matrix_on_every_rung(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    found = measure(donor, variant, rounds=1)
    with Checkpoint.open(variant) as checkpoint:
        shapes = [info.shape for info in checkpoint.tensors.values() if len(info.shape) == 2]
    weights = sum(rows * width for rows, width in shapes)
    assert found["rungs"].keys() == set(RUNGS)
    for text, figures in found["rungs"].items():
        rung = parse_rung(text)
        assert isinstance(rung, Residual)
        nbytes = sum(residual_bytes(rung, rows, width) for rows, width in shapes)
        assert figures["bits_per_weight"] == pytest.approx(8 * nbytes / weights)
        ratio = figures["seconds"] / found["from_pretrained_seconds"]
        assert figures["over_from_pretrained"] == ratio
