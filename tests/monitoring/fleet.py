"""A server with its real engine, five small models that share in every way, and its clients."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.registry.records import Role
from tests.server.keyed import give_key
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

MODELS = ("base", "near", "far", "alike", "apart")
# How each is onboarded: tuned within a budget, in the paper's way, and without losing a bit. Tuning
# takes as long as all the rest, so one is enough.
_WAYS: dict[str, dict[str, Any]] = {
    "near": {"policy": "thresholds", "tau_cos": 0.99, "tau_frob": 0.05, "donor": "base"},
    "far": {"policy": "budget", "budget_kl": 0.05, "donor": "base"},
    "alike": {"policy": "thresholds", "tau_cos": 0.99, "tau_frob": 0.05},
    "apart": {"policy": "exact", "donor": "base"},
}


def make_models(root: Path) -> None:
    """Writes the checkpoints."""
    base = make_checkpoint(root / "base", tie=False)
    make_variant(root / "near", base, scale=0.01)
    make_variant(root / "far", base, scale=0.5, seed=2)
    make_variant(root / "alike", base, scale=0.01, seed=3)
    make_variant(root / "apart", base, scale=0.5, seed=4)


@contextmanager
def fleet(root: Path) -> Iterator[tuple[LiveServer, str]]:
    """Runs the server, as yet with the donor alone, until the block ends; `root` is empty.

    Yields:
        The server, whose client shows an operator's key, and the key to scrape with.
    """
    make_models(root)
    state = root / "state"
    operator, scraper = give_key(state, Role.ADMIN), give_key(state, Role.METRICS)
    with live_server(
        state,
        models={"base": root / "base"},
        root=root,
        engine_command=None,
        # A cache in which five long sequences do not find room at once.
        settings={
            "engine": {"kv_cache_tokens": 512, "memory_budget": 1 << 30},
            "analysis": {"enabled": True},
        },
    ) as live:
        live.client.headers["Authorization"] = f"Bearer {operator.key}"
        live.until_ready()
        yield live, scraper.key


def onboard_everything(live: LiveServer, root: Path) -> None:
    """Onboards every model but the donor, which is there from the start."""
    for name, options in _WAYS.items():
        answer = live.onboard(name, root / name, **options)
        assert answer.status_code == httpx.codes.CREATED, answer.text


def study_everything(live: LiveServer) -> dict[str, Any]:
    """Waits for the study of what was onboarded; returns it."""

    def study() -> dict[str, Any]:
        card: dict[str, Any] = live.client.get(f"/analysis/{MODELS[0]}").json()
        return card

    live.until(lambda: study()["state"] == "done")
    return study()


def ask_everything(live: LiveServer) -> None:
    """Asks every model for what clients ask for, streams and long answers at once."""
    requests: list[tuple[str, dict[str, Any]]] = []
    for model in MODELS:
        chat = {"messages": [{"role": "user", "content": "Tell me about deltas."}]}
        requests += [
            ("/v1/chat/completions", {"model": model, "max_tokens": 12, **chat}),
            ("/v1/chat/completions", {"model": model, "max_tokens": 12, "stream": True, **chat}),
            ("/v1/completions", {"model": model, "prompt": "Once upon a time", "max_tokens": 8}),
            (
                "/v1/completions",
                {"model": model, "prompt": "Once upon a time", "stream": True,
                 "max_tokens": 160, "ignore_eos": True},
            ),
            ("/tokenize", {"model": model, "prompt": "Once upon a time"}),
        ]  # fmt: skip
    with ThreadPoolExecutor(len(MODELS)) as threads:
        for answer in threads.map(lambda request: _asked(live, *request), requests):
            assert answer.status_code == httpx.codes.OK, answer.text


def _asked(live: LiveServer, route: str, body: dict[str, Any]) -> httpx.Response:
    return live.client.post(route, json=body)
