from __future__ import annotations

from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError
from server.cli.bench.decode import measure_kin, measure_residual, measure_single
from server.cli.bench.fleet import measure_fleet
from server.cli.bench.scenario import Settings
from tests.server.cli.bench.small import SHAPE


@pytest.fixture
def alone(tmp_path: Path) -> Settings:
    return Settings(models=tmp_path, peers=None, rounds=1, tokens=8, shape=SHAPE)


def test_single_measures_batches_a_prompt_and_the_read(alone: Settings) -> None:
    found = measure_single(alone)
    for work in ("batch 1", "batch 8", "batch 16", "prefill"):
        assert found[work]["figures"]["linker"]["tokens_per_s"] > 0
        assert found[work]["ratio"] is None
    assert len(found["batch 16"]["figures"]["linker"]["rates"]) == 1
    step = found["batch 1"]["figures"]["linker"]["itl_ms"]["p50"]
    assert found["read"]["step_ms"] == pytest.approx(step)
    assert found["read"]["steps_over_reads"] == pytest.approx(step / found["read"]["read_ms"])
    assert found["memory"]["linker"]["anonymous_mib"] > 1
    assert "server.cli.bench.runners.own" in found["commands"]["linker"]


def test_kin_are_measured_beside_one_variant(alone: Settings) -> None:
    found = measure_kin(alone)
    rates = {work: figures["tokens_per_s"] for work, figures in found["figures"].items()}
    assert set(rates) == {"one variant", "equal", "own-head"}
    one = rates["one variant"]
    assert found["ratios"] == pytest.approx({work: rate / one for work, rate in rates.items()})


def test_deltas_are_measured_beside_own_copies_and_aliases(alone: Settings) -> None:
    found = measure_residual(alone)
    rates = {work: figures["tokens_per_s"] for work, figures in found["figures"].items()}
    assert found["ratios"] == pytest.approx(
        {
            "over own copies": rates["deltas"] / rates["own copies"],
            "over aliased": rates["deltas"] / rates["aliased"],
        }
    )
    assert (alone.models / "near-1-int4-64").is_dir()


def test_fleet_without_peers_is_refused(alone: Settings) -> None:
    with pytest.raises(InvalidRequestError, match="peers"):
        measure_fleet(alone)
