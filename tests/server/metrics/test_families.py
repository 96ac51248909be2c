"""The table, what is exposed, and what is documented say the same."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from linker_core.engine.messages import ModelBytes, ModelLoad, Snapshot
from linker_core.sharing.planner import plan_donor
from linker_core.weights.checkpoint import Checkpoint
from server.metrics.admission import AdmissionMetrics
from server.metrics.analysis import AnalysisSeries
from server.metrics.engine import render_engine
from server.metrics.evictions import EvictionMetrics
from server.metrics.exposition import Exposition
from server.metrics.families import FAMILIES, Kind
from server.metrics.fleet import FleetSeries
from server.metrics.serving import ServingMetrics
from server.metrics.sharing import SharingSeries
from server.metrics.view import View
from server.registry.records import ModelRecord, ModelState
from server.registry.store import Registry
from tests.server.summaries import study_of
from tests.tiny import make_checkpoint

DOCUMENTED = Path(__file__).parents[3] / "docs" / "http.md"
PRICE = {"kl": 0.5, "kl_upper": 0.625, "top1": 0.75, "ppl_ratio": 1.5}


class OneScan:
    """A registry that has scanned everything."""

    def scan(self, _donor: str, _variant: str) -> dict[str, Any]:
        return {"blocks": [{"index": 0, "cos": 0.5, "epsilon": 0.25}]}


@pytest.fixture
def exposed(tmp_path: Path) -> str:
    """What a server exposes, one of whose models has everything that can be known of one."""
    with Checkpoint.open(make_checkpoint(tmp_path / "base")) as checkpoint:
        plan, config = plan_donor(checkpoint, fingerprint="f").to_json(), checkpoint.config
    plan |= {"donor_fingerprint": "d", "price": PRICE, "budget_kl": 0.7}
    record = ModelRecord(
        name="full", source="", request={}, state=ModelState.READY, position=0, created_at=0.0,
        plan=plan,
    )  # fmt: skip
    bare = ModelRecord(
        name="bare", source="", request={}, state=ModelState.ONBOARDING, position=1, created_at=0.0
    )
    variants = ("a", "b", "c")
    family = [replace(bare, name=name, donor="full", family="full") for name in variants]
    view = View(
        models=(record, bare, *family),
        configs={"full": config},
        studies={"full": study_of("full", *variants)},
        engine_up=True,
        engine_restarts=2,
        snapshot=Snapshot(
            models={"full": ModelBytes(logical=3, unique=2, shared=1)},
            load={"full": ModelLoad(running=1, waiting=0)},
            device="cpu",
            device_weight_bytes=2,
            device_kv_bytes=1,
            device_free_bytes=4,
            reserved_bytes=0,
            kv_usage_ratio=0.5,
            num_preemptions=6,
            prefix_queries=8,
            prefix_hits=7,
            batch_variants={1: 3, 2: 4, 200: 1},
        ),
    )
    registry = CollectorRegistry()
    metrics = ServingMetrics(registry, rejection_reasons=("queue_full",))
    AdmissionMetrics(registry, stages=("scan",))
    EvictionMetrics(registry)
    for model in view.models:
        metrics.add_model(model.name)
    parts = (
        render_engine,
        FleetSeries().render,
        metrics.render,
        SharingSeries(cast(Registry, OneScan())).render,
        AnalysisSeries().render,
    )
    return Exposition(registry, parts, version="1.2.3").render(view).decode()


def value(exposed: str, line: str) -> float:
    (found,) = (sample for sample in exposed.splitlines() if sample.rpartition(" ")[0] == line)
    return float(found.rpartition(" ")[2])


def test_every_family_of_the_table_is_exposed_and_no_other(exposed: str) -> None:
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposed, re.MULTILINE))
    assert types == {name: family.kind.value for name, family in FAMILIES.items()}
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", exposed, re.MULTILINE))
    assert helps == {name: family.help for name, family in FAMILIES.items()}


def test_every_family_has_samples_with_the_labels_of_the_table(exposed: str) -> None:
    names = {sample: family for family in FAMILIES.values() for sample in family.samples}
    seen = set()
    for family in text_string_to_metric_families(exposed):
        for sample in family.samples:
            declared = names[sample.name]
            bucket = {"le"} if sample.name.endswith("_bucket") else set()
            assert set(sample.labels) == {*declared.labels, *bucket}, sample
            seen.add(sample.name)
    assert seen == set(names)


def test_families_stand_together_and_no_series_twice(exposed: str) -> None:
    headers = re.findall(r"^# TYPE (\S+)", exposed, re.MULTILINE)
    assert len(headers) == len(set(headers))
    current, lines = "", Counter[str]()
    for line in exposed.splitlines():
        if line.startswith("# TYPE "):
            current = line.split()[2]
        elif not line.startswith("#"):
            assert re.split(r"[{ ]", line)[0] in FAMILIES[current].samples
            lines[line.rpartition(" ")[0]] += 1
    assert set(lines.values()) == {1}


def test_engine_says_what_it_has_counted(exposed: str) -> None:
    assert value(exposed, "linker_engine_up") == 1
    assert value(exposed, "linker_engine_restarts_total") == 2
    assert value(exposed, "linker_engine_steps_total") == 8
    assert value(exposed, "linker_batch_variants_sum") == 3 + 8 + 200
    assert value(exposed, 'linker_batch_variants_bucket{le="1.0"}') == 3
    assert value(exposed, 'linker_batch_variants_bucket{le="128.0"}') == 7
    assert value(exposed, 'linker_batch_variants_bucket{le="+Inf"}') == 8
    assert value(exposed, "linker_kv_cache_usage_ratio") == 0.5
    assert value(exposed, 'linker_build_info{version="1.2.3"}') == 1


def test_without_an_engine_its_counters_are_zero() -> None:
    view = View(models=(), snapshot=None, engine_up=False, engine_restarts=0)
    text = "".join(render_engine(view))
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert {line.rpartition(" ")[2] for line in lines} <= {"0", "0.0"}


def test_names_follow_prometheus_conventions() -> None:
    for name, family in FAMILIES.items():
        assert name == family.name
        assert re.fullmatch(r"(linker|process)_[a-z0-9_]+", name)
        assert name.endswith("_total") == (family.kind is Kind.COUNTER)
        assert bool(family.buckets) == (family.kind is Kind.HISTOGRAM)
        assert list(family.buckets) == sorted(set(family.buckets))
        assert not {"le", "quantile", "job", "instance"} & set(family.labels)


def test_buckets_are_those_of_vllm() -> None:
    ttft = (
        .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
    )  # fmt: skip
    phases = (
        .1, .2, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480,
    )  # fmt: skip
    for name in ("time_to_first_token", "inter_token_latency", "request_time_per_output_token"):
        assert FAMILIES[f"linker_{name}_seconds"].buckets == ttft
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time",
                 "request_decode_time", "request_inference_time"):  # fmt: skip
        assert FAMILIES[f"linker_{name}_seconds"].buckets == phases
    counts = FAMILIES["linker_request_prompt_tokens"].buckets
    assert counts[:7] == (1, 2, 5, 10, 20, 50, 100)
    assert counts[-1] == 200_000
    assert FAMILIES["linker_request_generation_tokens"].buckets == counts


def test_documentation_names_every_family_with_its_labels_and_no_other() -> None:
    text = DOCUMENTED.read_text()
    section = text[text.index("\n## Metrics\n") :]
    section = section[: section.find("\n## ", 4)] if "\n## " in section[4:] else section
    named = dict(re.findall(r"`((?:linker|process)_[a-z0-9_]+)(?:\{([a-z_,]*)\})?`", section))
    assert named == {name: ",".join(family.labels) for name, family in FAMILIES.items()}
