"""A world of small models, and how each of them answers when it is left in peace."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx

from server.settings import Settings
from tests.server.in_process import Server
from tests.server.onboarding.family import residual
from tests.tiny import make_checkpoint, make_variant

BASE, STRANGER = "base", "stranger"
SHARE: dict[str, Any] = {"policy": "thresholds", "tau_cos": 0.0, "tau_frob": 1e6}
VARIANTS: dict[str, dict[str, Any]] = {
    "aliased": SHARE,
    "coded": {},
    "exact": {"policy": "exact"},
    "own": {"policy": "thresholds", "tau_cos": 1.0, "tau_frob": 0.0},
    "wide": SHARE,
}
NAMES = (BASE, *VARIANTS, STRANGER)


class World:
    """What all runs share: checkpoints, and answers and bytes that are known."""

    def __init__(self, root: Path) -> None:
        self.root = root
        base = make_checkpoint(root / BASE, tie=False)
        make_checkpoint(root / STRANGER, layers=1, seed=9)
        down = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)]
        make_variant(root / "aliased", base, scale=dict.fromkeys([*down, "lm_head.weight"], 0.1))
        residual(make_variant(root / "whole", base, scale=0.05, seed=2), {"0.001": "int4:64"})
        make_variant(root / "exact", base, scale=dict.fromkeys(down[:1], 0.3), seed=3)
        make_variant(root / "own", base, scale=0.3, seed=4)
        make_variant(root / "wide", base, scale=0.01, seed=5, added_tokens=("<|tool|>",))
        self.answers: dict[str, str] = {}
        self.own_answers: dict[str, str] = {}  # with the weights that were onboarded
        self.unique_bytes: dict[str, int] = {}

    def settings(self, state: Path, budget_bytes: int) -> Settings:
        return Settings.model_validate(
            {
                "storage": {"state": state},
                "models": {"root": self.root, "load_timeout_s": 30},
                "engine": {"memory_budget": budget_bytes, "kv_cache_tokens": 512},
                "analysis": {"enabled": False},
            }
        )

    async def learn(self, state: Path) -> None:
        """Notes how the models answer, and what they hold, beside each other and undisturbed."""
        server = await Server.start(self.settings(state, 1 << 30))
        for name in (BASE, "whole", *VARIANTS, STRANGER):
            donor = "auto" if name in (BASE, STRANGER) else BASE
            response = await onboard(server, name, donor, self.root)
            assert response.status_code == 201, response.text
            if name == "whole":  # measuring takes more room than the models here have
                [delta] = (state / "deltas").iterdir()
                shutil.copytree(delta, self.root / "coded")
        for name in NAMES:
            self.answers[name] = await answer(server, name)
            card = (await server.client.get(f"/models/{name}")).json()
            self.unique_bytes[name] = card["bytes"]["unique"]
        for name in (BASE, "exact", "own", STRANGER):
            self.own_answers[name] = self.answers[name]
        for name in ("aliased", "wide"):
            body = {"name": "apart", "source": str(self.root / name), "donor": BASE}
            response = await server.post("/models", {**body, "policy": "exact"}, wait=True)
            assert response.status_code == 201, response.text
            self.own_answers[name] = await answer(server, "apart")
            assert self.own_answers[name] != self.answers[name]
            await server.client.delete("/models/apart")
        await server.stop()


async def onboard(
    server: Server, name: str, donor: str, root: Path, *, wait: bool = True
) -> httpx.Response:
    body = {"name": name, "source": str(root / name), "donor": donor, **VARIANTS.get(name, {})}
    return await server.post("/models", body, wait=wait)


async def ask(server: Server, name: str, mode: str = "planned") -> httpx.Response:
    body = {"model": name, "prompt": "Once upon", "temperature": 0, "max_tokens": 6,
            "ignore_eos": True, "logprobs": 1, "variant_mode": mode}  # fmt: skip
    return await server.post("/v1/completions", body)


async def answer(server: Server, name: str) -> str:
    response = await ask(server, name)
    assert response.status_code == 200, response.text
    return said(response)


def said(response: httpx.Response) -> str:
    """Returns an answer to the bit of its log-probabilities."""
    choice = response.json()["choices"][0]
    return f"{choice['text']!r} {choice['logprobs']['token_logprobs']}"
