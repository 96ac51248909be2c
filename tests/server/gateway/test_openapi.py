from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.live import LiveServer


@pytest.fixture(scope="module")
def document(server: LiveServer) -> Any:
    return server.client.get("/openapi.json").json()


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"model", "messages", "temperature", "stream_options"}),
        ("/v1/completions", {"model", "prompt", "n", "logprobs"}),
        ("/models", {"name", "source", "donor", "tau_cos", "tau_frob", "tier", "budget_kl"}),
        ("/models/plan", {"source", "donor", "policy", "budget_kl", "max_bytes"}),
    ],
)
def test_bodies_of_posts_are_described(document: Any, path: str, fields: set[str]) -> None:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rsplit("/", 1)[1]
    assert fields <= document["components"]["schemas"][name]["properties"].keys()


def test_every_reference_leads_somewhere(document: Any) -> None:
    found = set(references(document))
    assert found
    for reference in found:
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_every_route_is_listed_with_its_refusals(document: Any) -> None:
    assert {"/health", "/ready", "/metrics", "/v1/models", "/models/jobs/{job_id}"} <= document[
        "paths"
    ].keys()
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "4XX", "5XX"} <= chat.keys()
    assert "text/event-stream" in chat["200"]["content"]
