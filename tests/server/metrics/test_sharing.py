"""What is written of plans, their scans and their prices."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from linker_core.errors import NotReadyError
from linker_core.sharing.planner import plan_donor
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from server.metrics.sharing import SharingSeries
from server.metrics.view import View
from server.registry.records import ModelRecord, ModelState
from server.registry.store import Registry
from tests.tiny import make_checkpoint

PLAN: dict[str, Any] = {
    "policy": "budget", "donor_fingerprint": "d", "variant_fingerprint": "v",
    "blocks": {"alias": 1, "residual": 0, "own": 1, "total": 2},
    "rungs": {
        "model.layers.0.mlp.up_proj.weight": "alias", "model.layers.1.mlp.up_proj.weight": "own",
    },
    "rung_bytes": {"alias": 0, "int2": 24, "lowrank+signs": 40, "own": 8}, "bits_per_weight": 1.5,
    "price": {"kl": 0.5, "kl_upper": 0.625, "top1": 0.75, "ppl_ratio": 1.5}, "budget_kl": 0.7,
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
        self.reads += 1
        if self.locked:
            raise NotReadyError("locked")
        return self.report


class Shown:
    """The series of some models, which tests change."""

    def __init__(self, scans: Scans, *models: ModelRecord) -> None:
        self.models = list(models)
        self.configs: Mapping[str, ModelConfig] = {}
        self._series = SharingSeries(cast(Registry, scans))

    def pieces(self) -> list[str]:
        return self._series.render(
            View(
                models=self.models,
                snapshot=None,
                engine_up=True,
                engine_restarts=0,
                configs=self.configs,
            )
        )

    def text(self) -> str:
        return "".join(self.pieces())


@pytest.fixture
def scans() -> Scans:
    return Scans()


def test_plan_shows_its_price_and_every_block(scans: Scans) -> None:
    lines = Shown(scans, NEAR).text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'linker_model_blocks{model="near",rung="alias"} 1',
        'linker_model_blocks{model="near",rung="residual"} 0',
        'linker_model_blocks{model="near",rung="own"} 1',
        'linker_model_rung_bytes{model="near",rung="rows"} 0',
        'linker_model_rung_bytes{model="near",rung="lowrank"} 0',
        'linker_model_rung_bytes{model="near",rung="signs"} 0',
        'linker_model_rung_bytes{model="near",rung="int2"} 24',
        'linker_model_rung_bytes{model="near",rung="int3"} 0',
        'linker_model_rung_bytes{model="near",rung="int4"} 0',
        'linker_model_rung_bytes{model="near",rung="lowrank+signs"} 40',
        'linker_model_rung_bytes{model="near",rung="lowrank+int2"} 0',
        'linker_model_rung_bytes{model="near",rung="lowrank+int3"} 0',
        'linker_model_rung_bytes{model="near",rung="lowrank+int4"} 0',
        'linker_model_rung_bytes{model="near",rung="own"} 8',
        'linker_model_bits_per_weight{model="near"} 1.5',
        'linker_plan_kl_nats{model="near"} 0.5',
        'linker_plan_kl_upper_nats{model="near"} 0.625',
        'linker_plan_top1_agreement_ratio{model="near"} 0.75',
        'linker_plan_perplexity_ratio{model="near"} 1.5',
        'linker_plan_budget_kl_nats{model="near"} 0.7',
        'linker_block_cosine{block="0",model="near"} 0.25',
        'linker_block_cosine{block="1",model="near"} 1.0',
        'linker_block_epsilon{block="0",model="near"} 0.125',
        'linker_block_epsilon{block="1",model="near"} 0.0',
        'linker_block_rung{block="0",model="near",rung="alias"} 1',
        'linker_block_rung{block="1",model="near",rung="own"} 1',
    ]


def test_price_that_an_exporter_claims_is_not_shown_as_measured(scans: Scans) -> None:
    text = Shown(scans, replace(NEAR, plan=PLAN | {"policy": "delta"})).text()
    assert "linker_plan_kl_nats{" not in text
    assert "linker_plan_budget_kl_nats{" not in text
    assert 'linker_model_bits_per_weight{model="near"}' in text


def test_price_that_is_held_against_no_budget_shows_none(scans: Scans) -> None:
    text = Shown(scans, replace(NEAR, plan=PLAN | {"budget_kl": None})).text()
    assert "linker_plan_budget_kl_nats{" not in text
    assert "linker_plan_kl_upper_nats{" in text


def test_text_is_made_again_only_for_other_plans(scans: Scans) -> None:
    shown = Shown(scans, NEAR)
    first = shown.pieces()
    shown.models[0] = replace(NEAR, last_used_at=1.0)
    assert shown.pieces() is first
    shown.models.append(replace(NEAR, name="far"))
    assert 'linker_block_cosine{block="1",model="far"}' in shown.text()
    assert scans.reads == 2  # one for each plan
    shown.models[0] = replace(NEAR, plan={**PLAN, "price": None})
    assert 'linker_plan_kl_nats{model="near"}' not in shown.text()
    assert 'linker_plan_kl_nats{model="far"}' in shown.text()
    assert scans.reads == 3
    shown.models.clear()
    assert "{" not in shown.text()


def test_bytes_of_blocks_are_known_once_the_model_was_resident(
    scans: Scans, tmp_path: Path
) -> None:
    with Checkpoint.open(make_checkpoint(tmp_path / "base")) as checkpoint:
        plan, config = plan_donor(checkpoint, fingerprint="f"), checkpoint.config
    shown = Shown(scans, replace(NEAR, plan=plan.to_json()))
    assert "linker_block_unique_bytes{" not in shown.text()
    shown.configs = {"near": config}
    resident = shown.pieces()
    families = text_string_to_metric_families("".join(resident))
    found = {family.name: family.samples for family in families}
    blocks = [sample.value for sample in found["linker_block_unique_bytes"]]
    sections = {s.labels["section"]: s.value for s in found["linker_section_unique_bytes"]}
    assert len(blocks) == config.num_layers
    assert sum(blocks) == sections["blocks"]
    assert set(sections) == {"embed", "blocks", "final_norm"}  # the head is the embedding
    assert sum(sections.values()) == plan.unique_bytes
    shown.configs = {}
    assert shown.pieces() is resident  # what it holds whenever it is
    shown.configs = {"near": replace(config)}
    assert shown.pieces() is resident


def test_locked_registry_leaves_the_series_as_they_were(scans: Scans) -> None:
    shown = Shown(scans, NEAR)
    first = shown.text()
    shown.models.append(replace(NEAR, name="far"))
    scans.locked = True
    assert shown.text() == first
    scans.locked = False
    assert 'model="far"' in shown.text()


def test_locked_registry_is_asked_once_a_scrape(scans: Scans) -> None:
    shown = Shown(scans, NEAR, replace(NEAR, name="far"))
    scans.locked = True
    assert "{" not in shown.text()
    assert scans.reads == 1


def test_locked_registry_keeps_no_series_of_a_deleted_model(scans: Scans) -> None:
    shown = Shown(scans, NEAR, replace(NEAR, name="far"))
    assert 'model="far"' in shown.text()
    del shown.models[1]
    shown.models.append(replace(NEAR, name="new"))
    scans.locked = True
    text = shown.text()
    assert 'linker_block_cosine{block="0",model="near"}' in text
    assert 'model="far"' not in text
    scans.locked = False
    assert 'model="new"' in shown.text()


@pytest.mark.parametrize(
    "report",
    [{}, {"blocks": [{"index": 0}]}, {"blocks": 3}, {"blocks": [BLOCKS[0] | {"cos": "x"}]}],
)
def test_incomplete_scan_has_no_series_and_harms_no_other(
    scans: Scans, report: dict[str, Any]
) -> None:
    scans.report = report
    text = Shown(scans, NEAR).text()
    assert 'linker_plan_kl_nats{model="near"}' in text
    assert "linker_block_cosine{" not in text


@pytest.mark.parametrize(
    "rungs", [None, 3, {"model.odd": "own"}, {"model.layers.0.mlp.up_proj.weight": "int9:64"}]
)
def test_incomplete_plan_has_no_blocks_and_harms_no_other(
    scans: Scans, rungs: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        text = Shown(scans, replace(NEAR, plan=PLAN | {"rungs": rungs})).text()
    assert "linker_block_rung{" not in text
    assert 'linker_block_cosine{block="1",model="near"}' in text
    assert "incomplete" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        {"bits_per_weight": None}, {"bits_per_weight": "1.5"}, {"rung_bytes": []},
        {"rung_bytes": {"own": None}}, {"blocks": 3}, {"price": {"kl": 0.5}},
        {"price": {**PLAN["price"], "top1": None}}, {"budget_kl": "x"},
    ],
)  # fmt: skip
def test_damaged_plan_has_no_series_and_harms_no_other(
    scans: Scans, damage: dict[str, Any]
) -> None:
    text = Shown(scans, replace(NEAR, plan=PLAN | damage), replace(NEAR, name="far")).text()
    assert list(text_string_to_metric_families(text))
    assert 'linker_model_bits_per_weight{model="far"} 1.5' in text
    assert 'linker_model_bits_per_weight{model="near"' not in text
    assert 'linker_block_cosine{block="1",model="near"}' in text  # which the scan says


def test_model_without_a_plan_has_no_series(scans: Scans) -> None:
    assert "{" not in Shown(scans, replace(NEAR, plan=None)).text()
