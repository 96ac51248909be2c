"""What one key has asked is neither found nor felt by another, on the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from server.registry.records import Role
from tests.server.keyed import client_of, give_key
from tests.server.live import LiveServer, live_server

PROMPT = list(range(20, 84))  # four pages


class Tenants(NamedTuple):
    """A server of the real engine, and two keys for it."""

    live: LiveServer
    keys: tuple[str, str]

    def ask(self, who: int, prompt: list[int], **more: Any) -> dict[str, Any]:
        """Returns an answer to one of the keys."""
        body = {"model": "base", "prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
        with client_of(self.live, self.keys[who]) as client:
            response = client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def cached(self, who: int, prompt: list[int], **more: Any) -> int:
        """Returns how much of a prompt was found computed."""
        usage = self.ask(who, prompt, **more)["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found


@pytest.fixture(scope="module")
def tenants(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    state = tmp_path_factory.mktemp("tenants")
    keys = (give_key(state, Role.CLIENT).key, give_key(state, Role.CLIENT).key)
    models = {"base": family / "base"}
    with live_server(state, models=models, engine_command=None) as live:
        live.until_ready()
        yield Tenants(live, keys)


def test_prefix_of_one_key_is_not_found_by_another_vllm_cve_2025_46570(tenants: Tenants) -> None:
    assert tenants.cached(0, PROMPT) == 0
    assert tenants.cached(0, PROMPT) == 48  # the last page is always computed
    assert tenants.cached(1, PROMPT) == 0
    assert tenants.cached(1, PROMPT) == 48
    assert tenants.cached(0, PROMPT, cache_salt="mine") == 0
    assert tenants.cached(1, PROMPT, cache_salt="mine") == 0


def test_who_asks_changes_no_answer(tenants: Tenants) -> None:
    prompt = PROMPT[::-1]
    first = tenants.ask(0, prompt, max_tokens=16)["choices"]
    assert first == tenants.ask(1, prompt, max_tokens=16)["choices"]
    assert first == tenants.ask(0, prompt, max_tokens=16)["choices"]
