"""What answers, listings and records carry beside the text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.clients.programs.scenarios import DONOR, VARIANT
from tests.server.live import LiveServer

Ask = Callable[[LiveServer], httpx.Response]
ROUTES: dict[str, tuple[str, Ask]] = {
    "chatcmpl-": ("chat.completion", lambda server: server.chat(VARIANT)),
    "cmpl-": ("text_completion", lambda server: server.complete(VARIANT, "a", max_tokens=1)),
}


@pytest.mark.parametrize("prefix", ROUTES)
def test_answer_says_when_it_was_created_and_has_an_id_of_its_own(
    echoing: LiveServer, prefix: str
) -> None:
    kind, ask = ROUTES[prefix]
    before = int(time.time())
    answers = [ask(echoing).json() for _ in range(2)]
    for answer in answers:
        assert answer["object"] == kind
        assert before <= answer["created"] <= time.time()
        assert answer["id"].startswith(prefix)
    assert answers[0]["id"] != answers[1]["id"]


def test_chat_has_no_service_tier_no_system_fingerprint_and_no_refusal(
    echoing: LiveServer,
) -> None:
    answer = echoing.chat(VARIANT, logprobs=True).json()
    assert answer["service_tier"] is None
    assert answer["system_fingerprint"] is None
    [choice] = answer["choices"]
    assert choice["message"]["refusal"] is None
    assert choice["logprobs"]["refusal"] is None


def test_listed_model_says_when_it_was_created_and_how_much_it_reads(echoing: LiveServer) -> None:
    for model in echoing.client.get("/v1/models").json()["data"]:
        assert model["object"] == "model"
        assert model["owned_by"] == "linker"
        assert 0 < model["created"] <= time.time()
        assert model["max_model_len"] == echoing.served(DONOR).max_model_len


def test_record_says_where_a_model_comes_from(echoing: LiveServer) -> None:
    def shown() -> dict[str, Any]:
        found: dict[str, Any] = echoing.client.get(f"/models/{VARIANT}").json()
        return found

    echoing.chat(VARIANT)
    echoing.until(lambda: shown()["last_used_at"] is not None)  # written down now and then
    record = shown()
    assert record["object"] == "model"
    assert record["donor"] == record["donor_choice"]["donor"] == DONOR
    assert record["fingerprint"] == echoing.served(VARIANT).fingerprint
    assert record["max_model_len"] == echoing.served(VARIANT).max_model_len
    assert record["created_at"] <= record["last_used_at"] <= time.time()
    assert record["source"] is None  # directories are nobody's business
    assert record["error"] is None
    assert record["base"] is None
    assert echoing.client.get("/models").json()["data"][1]["id"] == VARIANT


def test_job_says_how_far_it_is_and_what_came_of_it(echoing: LiveServer) -> None:
    source = echoing.served(VARIANT).text.path
    response = echoing.onboard("acme/again", source, wait=False, policy="exact")
    begun = response.json()
    assert (begun["object"], begun["model"]) == ("model.job", "acme/again")
    assert begun["finished_at"] is None
    where = response.headers["Location"]

    def job() -> dict[str, Any]:
        found: dict[str, Any] = echoing.client.get(where).json()
        return found

    echoing.until(lambda: job()["finished_at"] is not None)
    ended = job()
    assert (ended["id"], ended["status"], ended["stage"]) == (begun["id"], "succeeded", "loading")
    assert ended["created_at"] <= ended["finished_at"] <= time.time()
    assert ended["progress"]["done_bytes"] == ended["progress"]["total_bytes"]
    assert ended["error"] is None
    assert ended["result"]["bytes"]["unique"] >= 0
    assert echoing.client.delete("/models/acme/again").status_code == 200


def test_score_keeps_its_stderr(echoing: LiveServer) -> None:
    record = {"metrics": {"acc": 0.5}, "stderr": {"acc": 0.05}, "num_samples": 100}
    body = {
        "model": VARIANT, "variant_mode": "planned", "harness": "h 1", "tasks": {"piqa": record},
    }  # fmt: skip
    shown = echoing.client.post("/models/scores", json=body).json()["scores"]
    assert shown["planned"]["piqa"]["stderr"] == {"acc": 0.05}
