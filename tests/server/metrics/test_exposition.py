"""What a running server exposes, over the fake engine."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from linker_core.engine.messages import Command
from server.metrics.exposition import Exposition
from server.metrics.families import FAMILIES
from server.metrics.view import View
from server.registry.store import Registry
from tests.linker_core.test_started_threads import no_more
from tests.server.live import DEADLINE_S, LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

_MANY = 40  # more than there are threads for whatever blocks


def names(live: LiveServer) -> set[str]:
    """Every series, without its value."""
    lines = live.client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


def test_memory_series_follow_the_engine(server: LiveServer) -> None:
    card = server.client.get("/models/near").json()
    for kind in ("logical", "unique", "shared"):
        line = f'linker_model_weight_bytes{{family="base",kind="{kind}",model="near"}}'
        assert server.metric(line) == card["bytes"][kind]
    both = [server.client.get(f"/models/{m}").json()["bytes"]["unique"] for m in ("base", "near")]
    assert server.metric('linker_family_weight_bytes{family="base"}') == sum(both)
    assert server.metric('linker_device_memory_bytes{device="cpu",state="weights"}') == sum(both)
    kv_bytes = server.services.onboarder._admission.kv_bytes(server.served("base").text.config)
    assert server.metric('linker_device_memory_bytes{device="cpu",state="kv"}') == kv_bytes > 0


def test_sharing_series_show_every_block(server: LiveServer) -> None:
    plan = server.client.get("/models/near").json()["plan"]
    cosines = [
        server.metric(f'linker_block_cosine{{block="{block}",model="near"}}') for block in (0, 1)
    ]
    assert sum(cosines) / 2 == plan["mean_cos"]
    assert server.metric('linker_block_epsilon{block="1",model="near"}') > 0
    assert server.metric('linker_model_blocks{model="near",rung="alias"}') == 2
    assert server.metric('linker_model_blocks{model="base",rung="own"}') == 2


def test_state_is_one_for_one_state(server: LiveServer) -> None:
    states = ("onboarding", "ready", "unloaded", "failed")
    values = [
        server.metric(f'linker_model_state{{model="base",state="{state}"}}') for state in states
    ]
    assert values == [0, 1, 0, 0]


def test_serving_series_count_requests(server: LiveServer) -> None:
    families = (
        "time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_inference_time_seconds",
        "request_prompt_tokens", "request_generation_tokens",
    )  # fmt: skip

    def read() -> list[float]:
        return [
            server.metric('linker_prompt_tokens_total{model="near"}'),
            server.metric('linker_generation_tokens_total{model="near"}'),
            server.metric('linker_request_success_total{finished_reason="length",model="near"}'),
            server.metric('linker_request_prompt_tokens_sum{model="near"}'),
            server.metric('linker_request_generation_tokens_sum{model="near"}'),
            *(server.metric(f'linker_{family}_count{{model="near"}}') for family in families),
        ]

    before = read()
    server.complete("near", "abc", max_tokens=5)
    # Five tokens have four gaps.
    assert [after - old for after, old in zip(read(), before, strict=True)] == [
        3, 5, 1, 3, 5, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize(("asked", "num_generated"), [({"max_tokens": 0}, 0), ({"n": 3}, 6)])
def test_counts_are_those_that_clients_are_told(
    server: LiveServer, asked: dict[str, Any], num_generated: int
) -> None:
    def generated() -> float:
        return server.metric('linker_generation_tokens_total{model="near"}')

    before = generated()
    body = {"max_tokens": 2, "ignore_eos": True, "echo": True, **asked}
    usage = server.complete("near", "abcd", **body).json()["usage"]
    assert usage["completion_tokens"] == generated() - before == num_generated


def test_phases_of_a_request_add_up(server: LiveServer) -> None:
    phases = ("queue", "prefill", "decode", "inference")

    def read(family: str) -> float:
        return server.metric(f'linker_{family}_seconds_sum{{model="base"}}')

    def all_of() -> dict[str, float]:
        whole = ("e2e_request_latency", "inter_token_latency")
        return {name: read(name) for name in (*whole, *(f"request_{p}_time" for p in phases))}

    before = all_of()
    server.complete("base", "abc", max_tokens=5)
    after = all_of()
    spent = {name: after[name] - before[name] for name in after}
    parts = spent["request_prefill_time"] + spent["request_decode_time"]
    assert spent["request_inference_time"] == pytest.approx(parts)
    assert spent["inter_token_latency"] == pytest.approx(spent["request_decode_time"])
    assert spent["request_queue_time"] + parts <= spent["e2e_request_latency"] + 1e-9


def test_histograms_have_the_documented_buckets(server: LiveServer) -> None:
    text = server.client.get("/metrics").text
    ttft = 'linker_time_to_first_token_seconds_bucket{le="0.06",model="base"}'
    e2e = 'linker_e2e_request_latency_seconds_bucket{le="480.0",model="base"}'
    assert ttft in text
    assert e2e in text


def test_engine_totals_are_exposed(server: LiveServer) -> None:
    assert server.metric("linker_num_preemptions_total") == 3
    assert server.metric("linker_prefix_cache_queries_total") == 48
    assert server.metric("linker_prefix_cache_hits_total") == 32
    assert server.metric("linker_kv_cache_usage_ratio") == 0.25
    assert server.metric("linker_engine_steps_total") == 7
    assert server.metric("linker_batch_variants_sum") == 5 + 3 * 2
    assert server.metric('linker_batch_variants_bucket{le="2.0"}') == 5
    assert server.metric("linker_engine_up") == 1
    assert server.metric("linker_engine_restarts_total") == 0


def test_blocks_show_rungs_and_bytes_of_resident_models(server: LiveServer) -> None:
    assert server.metric('linker_block_rung{block="1",model="near",rung="alias"}') == 1
    assert server.metric('linker_block_rung{block="1",model="base",rung="own"}') == 1
    for model in ("base", "near"):
        held = sum(
            server.metric(f'linker_section_unique_bytes{{model="{model}",section="{section}"}}')
            for section in ("embed", "blocks", "final_norm")
        )
        assert held == server.client.get(f"/models/{model}").json()["bytes"]["unique"]


def test_admission_series_have_every_stage_and_outcome_from_the_start(server: LiveServer) -> None:
    text = server.client.get("/metrics").text
    for stage in ("open", "hash", "scan", "tune", "encode", "alias", "move", "ready"):
        for edge in ("0.01", "1200.0"):
            assert f'linker_admission_seconds_bucket{{le="{edge}",stage="{stage}"}}' in text
    assert server.metric('linker_admissions_total{outcome="failed"}') == 0


def test_unknown_names_make_no_series(server: LiveServer) -> None:
    before = names(server)
    for number in range(50):
        server.chat(f"surprise-{number}")
        server.client.get(f"/surprise-{number}")
        server.client.request(f"SURPRISE{number}", "/v1/models")
    assert names(server) == before


def test_every_family_is_exposed_and_its_types_are_the_tables(server: LiveServer) -> None:
    text = server.client.get("/metrics").text
    types = {line.split()[2]: line.split()[3] for line in text.splitlines() if "# TYPE" in line}
    assert types == {name: family.kind.value for name, family in FAMILIES.items()}
    assert list(text_string_to_metric_families(text))


def test_scrape_sends_the_engine_nothing_and_wakes_no_model(
    tmp_path: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"base": family / "base", "near": family / "near"}
    with live_server(tmp_path, models=models, root=family) as live:
        live.until_ready()
        assert live.client.post("/models/unload", json={"model": "near"}).status_code == 200
        sent: list[Command] = []
        monkeypatch.setattr(live.services.engine.client, "_put", sent.append)
        used = live.client.get("/models/near").json()["last_used_at"]
        for _ in range(3):
            assert live.metric('linker_model_state{model="near",state="unloaded"}') == 1
        assert sent == []
        assert live.client.get("/models/near").json()["last_used_at"] == used


def test_scrapes_that_wait_keep_nothing_else_waiting(
    tmp_path: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    scan = Registry.scan

    def stuck(registry: Registry, *pair: str) -> Any:
        assert let_go.wait(DEADLINE_S)
        return scan(registry, *pair)

    with live_server(tmp_path, models={"base": family / "base"}, root=family) as live:
        live.until_ready()
        live.onboard("near", family / "near").raise_for_status()
        monkeypatch.setattr(Registry, "scan", stuck)
        with ThreadPoolExecutor(_MANY) as scrapers:
            scrapes = [scrapers.submit(live.client.get, "/metrics") for _ in range(_MANY)]
            live.until(lambda: live.services.exposition._thread._work_queue.qsize() == _MANY - 1)
            assert live.client.get("/models/jobs").status_code == 200  # read on another thread
            assert not any(scrape.done() for scrape in scrapes)
            let_go.set()
            assert all('model="near"' in scrape.result().text for scrape in scrapes)


def test_scrape_is_answered_where_no_thread_can_be_started_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exposition = Exposition(CollectorRegistry(), (), version="1.2.3")
    monkeypatch.setattr(threading.Thread, "start", no_more)
    view = View(models=(), snapshot=None, engine_up=False, engine_restarts=0)
    assert b'version="1.2.3"' in asyncio.run(exposition.scrape(view))
    exposition.close()


# Which one fine-tune is too few for.
_OF_STUDIES = {"linker_delta_norm", "linker_jackknife_cosine", "linker_diagnostic"}


def test_series_come_with_a_model_and_go_with_it(tmp_path: Path, family: Path) -> None:
    with live_server(tmp_path, models={"base": family / "base"}, root=family) as live:
        live.until_ready()
        before = names(live)
        body = {"name": "guest/near", "source": str(family / "near"), "donor": "base"}
        assert live.client.post("/models?wait=true", json=body).status_code == 201
        guest = {line for line in names(live) if 'model="guest/near"' in line}
        of_models = {
            sample
            for one in FAMILIES.values()
            if "model" in one.labels and "plan" not in one.name  # its price was not measured
            for sample in one.samples
        } - _OF_STUDIES
        assert {line.partition("{")[0] for line in guest} == of_models
        assert live.metric('linker_generation_tokens_total{model="guest/near"}') == 0
        live.complete("guest/near", "abc", max_tokens=2)
        assert live.client.delete("/models/guest/near").status_code == 200
        assert names(live) == before


def test_series_of_a_study_go_with_a_model_that_it_was_of(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    studied = {"analysis": {"enabled": True}}
    state = tmp_path / "state"
    with live_server(state, models={"base": base}, root=tmp_path, settings=studied) as live:
        live.until_ready()
        for seed, name in enumerate(("a", "b", "c")):
            variant = make_variant(tmp_path / name, base, scale=0.1, seed=seed)
            live.onboard(name, variant, donor="base").raise_for_status()
        pc1 = 'linker_pc1_variance_ratio{component="all",family="base"}'
        live.until(lambda: pc1 in names(live))
        assert len(of_study(live, "linker_delta_norm")) == 3
        assert live.client.delete("/models/b").status_code == 200
        assert 'model="b"' not in live.client.get("/metrics").text
        assert pc1 not in names(live)
        live.until(lambda: len(of_study(live, "linker_delta_norm")) == 2)
        assert of_study(live, "linker_pc1") == set()  # of two
        assert len(of_study(live, "linker_pairwise_cosine")) == 1


def of_study(live: LiveServer, prefix: str) -> set[str]:
    return {line for line in names(live) if line.startswith(prefix)}


def test_engine_that_died_is_counted_and_its_totals_begin_again(
    tmp_path: Path, family: Path
) -> None:
    with live_server(tmp_path, models={"base": family / "base"}, root=family) as live:
        live.until_ready()
        live.services.engine.kill()
        live.until(lambda: live.metric("linker_engine_restarts_total") == 1)
        live.until_ready()
        assert live.metric("linker_engine_up") == 1
        assert live.metric("linker_engine_steps_total") == 7
