from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError
from server.cli.bench.gram import measure, run
from tests.analysis.planted import Structure, plant_family


def test_measure_gives_ratios_of_what_it_timed_and_equal_shares(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=3))
    found = measure(planted.base, list(planted.variants.values()), rounds=1)
    with planted.open() as family:
        assert found["total_bytes"] == sum(c.nbytes for c in family.checkpoints)
    seconds = found["seconds"]
    assert found["gram_over_read"] == seconds["read"] / seconds["gram"]
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert found["largest_gap_of_shares"] < 1e-12
    for way in found["first_layer"].values():
        assert 1.0 < way["peak_private_mib"] < 256.0
        assert way["bytes"] > 0


def test_a_base_alone_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="BASE and VARIANTs"):
        run(argparse.Namespace(models=[Path("base")], rounds=1))
