from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from linker_core.errors import NotReadyError
from server.metrics.sharing import SharingExposition
from server.registry.records import ModelRecord, ModelState
from server.registry.store import Registry

PLAN: dict[str, Any] = {
    "policy": "budget", "donor_fingerprint": "d", "variant_fingerprint": "v",
    "blocks": {"alias": 1, "residual": 0, "own": 1, "total": 2},
    "rung_bytes": {"alias": 0, "int2": 24, "lowrank+signs": 40, "own": 8}, "bits_per_weight": 1.5,
    "price": {"kl": 0.5, "kl_upper": 0.6, "top1": 0.75, "ppl_ratio": 1.5},
}  # fmt: skip
NEAR = ModelRecord(
    name="near", source="", request={}, state=ModelState.READY, position=1, created_at=0.0,
    plan=PLAN,
)  # fmt: skip
BLOCKS = [{"index": 0, "cos": 0.25, "epsilon": 0.125}, {"index": 1, "cos": 1.0, "epsilon": 0.0}]


class Scans:
    """A registry of one scan that counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0
        self.locked = False
        self.report: dict[str, Any] = {"blocks": BLOCKS}

    def scan(self, donor: str, variant: str) -> dict[str, Any]:
        assert (donor, variant) == ("d", "v")
        if self.locked:
            raise NotReadyError("locked")
        self.reads += 1
        return self.report


@pytest.fixture
def scans() -> Scans:
    return Scans()


def exposition(models: list[ModelRecord], scans: Scans) -> SharingExposition:
    return SharingExposition(models=lambda: models, registry=cast(Registry, scans))


def test_plan_shows_its_price_and_every_block(scans: Scans) -> None:
    lines = exposition([NEAR], scans).render().decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'linker_model_blocks{model="near",rung="alias"} 1.0',
        'linker_model_blocks{model="near",rung="residual"} 0.0',
        'linker_model_blocks{model="near",rung="own"} 1.0',
        'linker_model_rung_bytes{model="near",rung="rows"} 0.0',
        'linker_model_rung_bytes{model="near",rung="lowrank"} 0.0',
        'linker_model_rung_bytes{model="near",rung="signs"} 0.0',
        'linker_model_rung_bytes{model="near",rung="int2"} 24.0',
        'linker_model_rung_bytes{model="near",rung="int3"} 0.0',
        'linker_model_rung_bytes{model="near",rung="int4"} 0.0',
        'linker_model_rung_bytes{model="near",rung="lowrank+signs"} 40.0',
        'linker_model_rung_bytes{model="near",rung="lowrank+int2"} 0.0',
        'linker_model_rung_bytes{model="near",rung="lowrank+int3"} 0.0',
        'linker_model_rung_bytes{model="near",rung="lowrank+int4"} 0.0',
        'linker_model_rung_bytes{model="near",rung="own"} 8.0',
        'linker_model_bits_per_weight{model="near"} 1.5',
        'linker_plan_kl_nats{model="near"} 0.5',
        'linker_plan_top1_agreement_ratio{model="near"} 0.75',
        'linker_plan_perplexity_ratio{model="near"} 1.5',
        'linker_block_cosine{block="0",model="near"} 0.25',
        'linker_block_cosine{block="1",model="near"} 1.0',
        'linker_block_epsilon{block="0",model="near"} 0.125',
        'linker_block_epsilon{block="1",model="near"} 0.0',
    ]


def test_price_that_an_exporter_claims_is_not_shown_as_measured(scans: Scans) -> None:
    text = exposition([replace(NEAR, plan=PLAN | {"policy": "delta"})], scans).render()
    assert b"linker_plan_kl_nats{" not in text
    assert b'linker_model_bits_per_weight{model="near"}' in text


def test_text_is_made_again_only_for_other_plans(scans: Scans) -> None:
    models = [NEAR]
    series = exposition(models, scans)
    first = series.render()
    models[0] = replace(NEAR, last_used_at=1.0)
    assert series.render() is first
    assert scans.reads == 1
    models[0] = replace(NEAR, plan={**PLAN, "price": None})
    assert b"linker_plan_kl_nats{" not in series.render()
    models.append(replace(NEAR, name="far"))
    assert b'linker_block_cosine{block="1",model="far"}' in series.render()
    models.clear()
    assert b"{" not in series.render()


def test_locked_registry_leaves_the_series_as_they_were(scans: Scans) -> None:
    models = [NEAR]
    series = exposition(models, scans)
    first = series.render()
    models.append(replace(NEAR, name="far"))
    scans.locked = True
    assert series.render() == first
    scans.locked = False
    assert b'model="far"' in series.render()


def test_locked_registry_keeps_no_series_of_a_deleted_model(scans: Scans) -> None:
    models = [NEAR, replace(NEAR, name="far")]
    series = exposition(models, scans)
    assert b'model="far"' in series.render()
    del models[1]
    models.append(replace(NEAR, name="new"))
    scans.locked = True
    text = series.render()
    assert b'linker_block_cosine{block="0",model="near"}' in text
    assert b'model="far"' not in text
    scans.locked = False
    assert b'model="new"' in series.render()


@pytest.mark.parametrize(
    "report",
    [{}, {"blocks": [{"index": 0}]}, {"blocks": 3}, {"blocks": [BLOCKS[0] | {"cos": "x"}]}],
)
def test_incomplete_scan_has_no_series_and_harms_no_other(
    scans: Scans, report: dict[str, Any]
) -> None:
    scans.report = report
    text = exposition([NEAR], scans).render()
    assert b'linker_plan_kl_nats{model="near"}' in text
    assert b"linker_block_cosine{" not in text


def test_model_without_a_plan_has_no_series(scans: Scans) -> None:
    assert b"{" not in exposition([replace(NEAR, plan=None)], scans).render()
