from __future__ import annotations

from tests.server.live import LiveServer


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
    def read() -> list[float]:
        return [
            server.metric('linker_prompt_tokens_total{model="near"}'),
            server.metric('linker_generation_tokens_total{model="near"}'),
            server.metric('linker_request_success_total{finished_reason="length",model="near"}'),
            server.metric('linker_time_to_first_token_seconds_count{model="near"}'),
            server.metric('linker_e2e_request_latency_seconds_count{model="near"}'),
        ]

    before = read()
    server.complete("near", "abc", max_tokens=5)
    assert [after - old for after, old in zip(read(), before, strict=True)] == [3, 5, 1, 1, 1]


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


def test_admission_series_have_every_stage_and_outcome_from_the_start(server: LiveServer) -> None:
    text = server.client.get("/metrics").text
    for stage in ("open", "hash", "scan", "tune", "encode", "alias", "move", "ready"):
        for edge in ("0.01", "1200.0"):
            assert f'linker_admission_seconds_bucket{{le="{edge}",stage="{stage}"}}' in text
    assert server.metric('linker_admissions_total{outcome="failed"}') == 0


def test_unknown_names_make_no_series(server: LiveServer) -> None:
    server.chat("surprise-name")
    assert "surprise-name" not in server.client.get("/metrics").text
