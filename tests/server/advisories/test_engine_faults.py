"""Rows D3 and F1-F6: engines that fail, and clients that leave, without anybody else noticing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from server.bridge.supervisor import EngineState, SupervisionLimits
from tests.server.advisories.attacks import Bystander, refused
from tests.server.fake_engine import Fault
from tests.server.live import LiveServer, live_server
from tests.tiny import save_state

LIMITS = SupervisionLimits(poll_s=0.05, stall_s=0.3, stall_kill_s=3600.0, backoff_s=0.01)


@pytest.fixture
def frail(tmp_path: Path, root: Path) -> Iterator[LiveServer]:
    """A server whose engine may be killed."""
    models = {"base": root / "base", "near": root / "near"}
    with live_server(tmp_path, models=models, root=root, limits=LIMITS) as live:
        live.until_ready()
        yield live


def pid_of(server: LiveServer) -> int:
    pid = server.services.engine.pid
    assert pid is not None
    return pid


def streamed(server: LiveServer, prompt: list[int], **more: Any) -> list[str]:
    """Returns the events of a stream."""
    body = {"model": "base", "prompt": prompt, "stream": True, "max_tokens": 50, **more}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def running(server: LiveServer, model: str = "base") -> float:
    return server.metric(f'linker_num_requests_running{{model="{model}"}}')


@pytest.mark.parametrize("stream", [False, True])
def test_sglang_issue_33187_logits_that_are_no_numbers(
    real: LiveServer, source: Path, stream: bool
) -> None:
    """All weights are finite, and so is what they make of every token but one."""
    state, fatal = load_file(source / "model.safetensors"), 70
    embedding, up = state["model.embed_tokens.weight"], state["model.layers.0.mlp.up_proj.weight"]
    embedding[:, 0], embedding[:, 4] = 50, 0
    embedding[fatal, 0], embedding[fatal, 4] = 0, 50
    up[:] = 0
    up[:, 4] = 3e38
    save_state(source, state)
    others = Bystander(real)
    assert real.onboard("attack", source, donor=None).status_code == 201
    body = {"model": "attack", "prompt": [fatal], "max_tokens": 4, "stream": stream}
    with ThreadPoolExecutor(4) as threads:
        attacks = [threads.submit(real.client.post, "/v1/completions", json=body) for _ in "ab"]
        beside = [threads.submit(others.ask) for _ in "ab"]
        for attack in attacks:
            refused(attack.result(), 500, "numerical_error")
        assert beside[0].result() == beside[1].result()
    assert real.complete("attack", [fatal - 1]).status_code == 200
    assert real.client.delete("/models/attack").status_code == 200


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_model_whose_answers_are_no_numbers_is_never_served(
    real: LiveServer, source: Path, name: str
) -> None:
    state = load_file(source / "model.safetensors")
    state[name][:] = 3e38  # finite, as weights must be; their products are not
    save_state(source, state)
    refused(real.onboard("attack", source, donor=None), 500, "unusable_model")
    assert real.client.get("/models/attack").json()["state"] == "failed"
    assert real.client.delete("/models/attack").status_code == 200


def test_tokenspeed_issue_434_fault_of_one_sequence_of_a_batch(target: LiveServer) -> None:
    others = Bystander(target)
    with ThreadPoolExecutor(8) as threads:
        beside = [threads.submit(others.ask) for _ in range(6)]
        attacks = [threads.submit(target.complete, "base", [Fault.FAIL, 5]) for _ in range(6)]
        for attack in attacks:
            refused(attack.result(), 500, "numerical_error")
        said = [answer.result() for answer in beside]
    assert all(answer == said[0] for answer in said)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_vllm_issue_39863_engine_dies_under_its_streams(frail: LiveServer, number: int) -> None:
    said = Bystander(frail).ask()
    first = pid_of(frail)
    with ThreadPoolExecutor(3) as threads:
        streams = [threads.submit(streamed, frail, [Fault.WAIT, 50]) for _ in "ab"]
        waiting = threads.submit(frail.complete, "near", [Fault.WAIT, 50], max_tokens=50)
        frail.until(lambda: running(frail) + running(frail, "near") == 3)
        os.kill(first, number)
        for stream in streams:
            *_, error, done = stream.result()
            assert done == "[DONE]"
            assert json.loads(error)["error"]["code"] == "engine_failure"
        refused(waiting.result(), 503, "engine_failure")
    frail.until_ready()
    assert pid_of(frail) != first
    assert Bystander(frail).ask() == said


def test_vllm_issue_36960_engine_hangs(frail: LiveServer) -> None:
    """A request of one client stops the whole loop: not ready, alive, and told to new clients."""
    hanging = threading.Thread(target=frail.complete, args=("base", [Fault.HANG]))
    hanging.start()
    frail.until(lambda: frail.client.get("/ready").status_code == 503)
    assert frail.client.get("/ready").headers["Retry-After"]
    frail.services.engine.kill()
    hanging.join(30)
    frail.until_ready()
    assert frail.chat("near").status_code == 200


def test_gonka_issue_1421_pause_is_seen_and_is_no_death(frail: LiveServer) -> None:
    first = pid_of(frail)
    os.kill(first, signal.SIGSTOP)
    try:
        frail.until(lambda: frail.client.get("/ready").status_code == 503)
        assert frail.client.get("/metrics").status_code == 200
    finally:
        os.kill(first, signal.SIGCONT)
    frail.until_ready()
    assert pid_of(frail) == first
    assert frail.chat("near").status_code == 200


def test_vllm_issue_48966_engine_that_always_dies(tmp_path: Path, root: Path) -> None:
    limits = replace(LIMITS, max_crashes=2)
    with live_server(
        tmp_path, models={"base": root / "base"}, limits=limits, engine_command=("false",)
    ) as server:
        server.until(server.services.engine.given_up.is_set)
        assert server.services.engine.state is EngineState.GIVEN_UP
        refused(server.chat("base"), 503)
        assert server.client.get("/ready").status_code == 503


def leave(server: LiveServer, body: dict[str, Any], *, stream: bool) -> None:
    """Sends a request and hangs up once it runs."""
    body = {"model": "base", "max_tokens": 100, "stream": stream, **body}
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)


@pytest.mark.parametrize(
    ("prompt", "stream"),
    [
        pytest.param([Fault.WAIT, 50], False, id="vllm-issue-320"),
        pytest.param([Fault.MUTE, 50], True, id="vllm-issue-50425"),
        pytest.param([Fault.SLOW, 50, 51], False, id="vllm-issue-54947"),
    ],
)
def test_client_leaves(target: LiveServer, prompt: list[int], stream: bool) -> None:
    line = 'linker_request_success_total{finished_reason="abort",model="base"}'
    before = target.metric(line)
    with ThreadPoolExecutor(4) as threads:
        for left in [
            threads.submit(leave, target, {"prompt": prompt}, stream=stream) for _ in range(4)
        ]:
            left.result()
    target.until(lambda: target.metric(line) == before + 4)
    target.until(lambda: running(target) == 0)


def test_lmcache_issue_4185_aborts_do_not_kill_the_engine(real: LiveServer) -> None:
    others = Bystander(real)
    said = others.ask()
    pid = pid_of(real)

    def attack(number: int) -> None:
        body = {"model": "near", "prompt": f"Once {number} " * 4, "max_tokens": 60,
                "stream": True, "ignore_eos": True}  # fmt: skip
        with (
            httpx.Client(base_url=real.url, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            if number % 3:
                next(response.iter_bytes())

    with ThreadPoolExecutor(8) as threads:
        attacks = [threads.submit(attack, number) for number in range(48)]
        assert others.ask() == said
        for left in attacks:
            left.result()
    real.until(lambda: running(real, "near") == 0)
    assert pid_of(real) == pid
    snapshot = real.services.engine.snapshot
    assert snapshot is not None
    assert sum(load.waiting for load in snapshot.load.values()) == 0


def test_vllm_issue_58192_limit_counts_before_the_work_begins(tmp_path: Path, root: Path) -> None:
    settings = {"http": {"max_inflight": 4}}
    with live_server(
        tmp_path, models={"base": root / "base"}, root=root, settings=settings
    ) as server:
        server.until_ready()
        begun = threading.Barrier(12)
        most = [0.0]

        def ask(_number: int) -> httpx.Response:
            begun.wait()
            return server.complete("base", [Fault.SLOW, 50], max_tokens=10, n=2)

        with ThreadPoolExecutor(12) as threads:
            asked = [threads.submit(ask, number) for number in range(12)]
            while not all(answer.done() for answer in asked):
                most[0] = max(most[0], running(server))
        statuses = [answer.result().status_code for answer in asked]
        assert most[0] <= 4
        assert statuses.count(200) >= 2
        for answer in asked:
            if answer.result().status_code != 200:
                refused(answer.result(), 429, "queue_full")
        assert server.complete("base", [5], n=2).status_code == 200


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_ntp_wall_clock_that_jumps(
    target: LiveServer, jump_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(target.complete, "base", [Fault.SLOW, 50], max_tokens=8)
        target.until(lambda: running(target) == 1)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + jump_s)
        assert target.chat("near").status_code == 200
        assert waiting.result().status_code == 200
    assert target.client.get("/ready").status_code == 200
