from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from linker_core.engine.messages import Abort, FinishReason, SamplingParams, StepOutput, Submit
from linker_core.errors import LinkerError
from server.cli.bench.gateway import measure
from server.cli.bench.gateway_load import Exchange
from server.cli.bench.gateway_requests import alternating, chat, counted_tokens
from server.cli.bench.gateway_scenarios import Plan
from server.cli.bench.runners.gateway_engine import InstantEngine
from server.cli.main import main


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a hurried run of all of it finds."""
    models = tmp_path_factory.mktemp("models")
    names = ("latency", "throughput", "stalls", "memory")
    return measure(models, Plan(rounds=1, scale=0.02), names)


def test_latency_is_told_of_each_kind_beside_the_same_bytes_without_a_gateway(
    found: dict[str, Any],
) -> None:
    latency = found["latency"]
    for name in ("gateway", "tcp", "uvicorn"):
        for kind in ("whole", "streamed"):
            assert 0 < latency[name][kind]["p50"] <= latency[name][kind]["p99"]
    added = latency["gateway"]["whole"]["p50"] - latency["tcp"]["whole"]["p50"]
    assert latency["bars"]["whole p50 added, ms"]["value"] == pytest.approx(added)


def test_every_bar_has_its_value_and_verdict(found: dict[str, Any]) -> None:
    bars = {name: bar for part in found.values() for name, bar in part["bars"].items()}
    assert len(bars) == 8
    for bar in bars.values():
        relation, _, limit = bar["bar"].partition(" ")
        met = bar["value"] <= float(limit) if relation == "<=" else bar["value"] >= float(limit)
        assert bar["verdict"] == ("pass" if met else "MISS")


def test_streams_are_counted_and_their_longest_gap_told(found: dict[str, Any]) -> None:
    assert found["throughput"]["gateway"]["tokens_per_s"] > 0
    for pace in ("paced", "at once"):
        assert found["stalls"][f"gateway {pace}"]["longest_gap_ms"] > 0


def test_memory_is_looked_at_after_each_round(found: dict[str, Any]) -> None:
    assert len(found["memory"]["gateway"]["held_mib"]) == 2


def test_scenario_of_another_name_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gateway", "--only", "latencies"]) != 0
    assert "Did you mean latency?" in capfd.readouterr().err


def test_requests_alternate_and_are_made_once() -> None:
    first, second = alternating(0), alternating(1)
    assert b'"stream":true' in second
    assert b'"stream":true' not in first
    assert chat("whole", 0, steps_per_s=0) is first


def test_stream_that_ends_early_is_an_error() -> None:
    body = b'data: {"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n'
    exchange = Exchange(asked_at=0.0, body=bytearray(body))
    assert counted_tokens([exchange, exchange], max_tokens=3) == 6
    with pytest.raises(LinkerError, match="4 tokens ended after 3"):
        counted_tokens([exchange], max_tokens=4)


# --- the stand-in engine ----------------------------------------------------------------------


@contextmanager
def engine() -> Iterator[tuple[InstantEngine, Connection]]:
    ours, theirs = Pipe()
    with ours, theirs:
        yield InstantEngine(ours), theirs


def submit(request_id: str, *, max_tokens: int, steps_per_s: int | None = None) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, seed=steps_per_s)
    return Submit(request_id=request_id, model="base", prompt_ids=(5, 6), sampling=sampling)


def test_stand_in_repeats_the_prompt_a_token_a_step_for_each_sequence() -> None:
    with engine() as (stand_in, connection):
        for name in ("a", "b"):
            assert stand_in.handle(submit(name, max_tokens=3))
        for _ in range(3):
            stand_in.step()
        steps = [connection.recv() for _ in range(3)]
        assert not stand_in.running
    assert all(isinstance(step, StepOutput) for step in steps)
    assert [[token.request_id for token in step.tokens] for step in steps] == [["a", "b"]] * 3
    assert [step.tokens[0].token_id for step in steps] == [5, 6, 5]
    reasons = [step.tokens[1].finish_reason for step in steps]
    assert reasons == [None, None, FinishReason.LENGTH]


def test_stand_in_keeps_the_pace_that_a_request_asks_for() -> None:
    with engine() as (stand_in, connection):
        stand_in.handle(submit("slow", max_tokens=2, steps_per_s=1))
        stand_in.handle(submit("fast", max_tokens=2))
        for _ in range(2):
            stand_in.step()
        steps = [connection.recv() for _ in range(2)]
        assert set(stand_in.running) == {"slow"}
        assert stand_in.timeout_s() > 0
    assert [len(step.tokens) for step in steps] == [2, 1]


def test_stand_in_gives_a_whole_answer_at_once_where_it_is_asked_to() -> None:
    with engine() as (stand_in, connection):
        stand_in.handle(submit("a", max_tokens=3, steps_per_s=0))
        stand_in.step()
        assert [token.token_id for token in connection.recv().tokens] == [5, 6, 5]
        assert not stand_in.running


def test_stand_in_forgets_what_is_aborted() -> None:
    with engine() as (stand_in, connection):
        stand_in.handle(submit("a", max_tokens=3))
        stand_in.handle(Abort(request_id="a"))
        stand_in.step()
        assert not connection.poll()


def test_bench_gateway_prints_one_document(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def fake(models: Path, plan: Plan, names: list[str]) -> dict[str, Any]:
        asked.append((models, plan.rounds, names))
        return {"latency": {"bars": {}}}

    monkeypatch.setattr("server.cli.bench.gateway.measure", fake)
    arguments = ["--rounds", "2", "--models", str(tmp_path), "--only", "latency"]
    assert main(["bench", "gateway", "--json", *arguments]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["latency"] == {"bars": {}}
    assert "proves nothing" not in printed.err
    assert main(["bench", "gateway", "--json", "--scale", "0.9", *arguments]) == 0
    assert "proves nothing about the bars" in capfd.readouterr().err
    assert asked == [(tmp_path, 2, ["latency"])] * 2
