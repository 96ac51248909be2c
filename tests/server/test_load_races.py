"""Models that come and go under traffic, on the real engine: every answer stays what it was."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.bridge.process import ENGINE_COMMAND
from tests.server.live import DEADLINE_S, LiveServer, live_server
from tests.server.onboarding.family import residual
from tests.tiny import make_checkpoint, make_variant

THREADS = 32
SHARE = {"policy": "thresholds", "tau_cos": 0.0, "tau_frob": 1e6}
OWN = {"policy": "thresholds", "tau_cos": 1.0, "tau_frob": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "aliased": SHARE, "coded": {"policy": "budget"}, "exact": {"policy": "exact"}, "own": OWN,
    "other": OWN, "wide": SHARE,
}  # fmt: skip
PROMPTS = ("Once upon a time", "There was", "In the beginning of all")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("races")
    base = make_checkpoint(root / "base", tie=False)
    down = "model.layers.0.mlp.down_proj.weight"
    make_variant(root / "aliased", base, scale={"lm_head.weight": 0.2})
    residual(make_variant(root / "coded", base, scale=0.05, seed=2), {"0.001": "int4:64"})
    make_variant(root / "exact", base, scale={down: 0.3}, seed=3)
    make_variant(root / "own", base, scale=0.3, seed=4)
    make_variant(root / "other", base, scale=0.5, seed=5)
    make_variant(root / "wide", base, scale=0.01, seed=6, added_tokens=("<|tool|>",))
    settings = {"engine": {"kv_cache_tokens": 4096}, "models": {"load_queue": 4 * THREADS}}
    with live_server(
        root / "state",
        models={"base": base},
        root=root,
        engine_command=ENGINE_COMMAND,
        settings=settings,
    ) as server:
        server.until_ready()
        for name, options in VARIANTS.items():
            response = server.onboard(name, root / name, donor="base", **options)
            assert response.status_code == 201, response.text
        yield server


def test_models_that_come_and_go_answer_as_ever(live: LiveServer) -> None:
    race(live, iterations=8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_models_that_come_and_go_eight_thousand_times_answer_as_ever(live: LiveServer) -> None:
    race(live, iterations=256)


def race(live: LiveServer, *, iterations: int) -> None:
    """Lets threads ask for models, load and unload them, in an order of their own each."""
    with client(live) as alone:
        expected = {
            (name, prompt): said(ask(alone, name, prompt))
            for name in VARIANTS
            for prompt in PROMPTS
        }
    assert len(set(expected.values())) > len(VARIANTS)
    evictions = 'linker_evictions_total{reason="request"}'
    before = live.metric(evictions)

    def visit(seed: int) -> Counter[str]:
        chance, done = random.Random(seed), Counter[str]()
        with client(live) as own:
            for _ in range(iterations):
                name, prompt = chance.choice(list(VARIANTS)), chance.choice(PROMPTS)
                drawn = chance.random()
                if drawn < 0.6:
                    assert said(ask(own, name, prompt)) == expected[name, prompt], name
                    done["asked"] += 1
                elif drawn < 0.8:
                    response = own.post("/models/unload", json={"model": name})
                    assert response.status_code in (200, 503), response.text  # on its way back
                    done["unloaded"] += response.status_code == 200
                else:
                    response = own.post("/models/load", json={"model": name})
                    assert response.status_code == 200, response.text
                    done["loaded"] += 1
        return done

    with ThreadPoolExecutor(THREADS) as pool:
        done = sum(pool.map(visit, range(THREADS)), Counter[str]())
    assert sum(done.values()) > 0.8 * THREADS * iterations
    assert live.metric(evictions) - before > iterations
    with client(live) as alone:
        for (name, prompt), answer in expected.items():
            assert said(ask(alone, name, prompt)) == answer, name
    live.until(lambda: live.metric("linker_kv_cache_usage_ratio") == 0)


def client(live: LiveServer) -> httpx.Client:
    return httpx.Client(base_url=live.url, timeout=DEADLINE_S, trust_env=False)


def ask(own: httpx.Client, model: str, prompt: str) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8,
            "ignore_eos": True, "logprobs": 1}  # fmt: skip
    return own.post("/v1/completions", json=body)


def said(response: httpx.Response) -> str:
    """Returns an answer to the bit of its log-probabilities."""
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return f"{choice['text']!r} {choice['logprobs']['token_logprobs']}"
