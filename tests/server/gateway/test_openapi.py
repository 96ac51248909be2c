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
    ("method", "path", "fields"),
    [
        ("post", "/v1/chat/completions", {"model", "messages", "temperature", "stream_options"}),
        ("post", "/v1/completions", {"model", "prompt", "n", "logprobs"}),
        (
            "post",
            "/models",
            {"name", "source", "donor", "tau_cos", "tau_frob", "tier", "budget_kl"},
        ),
        ("post", "/models/plan", {"source", "donor", "policy", "budget_kl", "max_bytes"}),
        ("post", "/models/plan", {"models", "donor", "budget_bytes"}),
        ("patch", "/models/{name}", {"policy", "budget_kl", "max_bytes", "tier"}),
        ("patch", "/models/{name}", {"pin", "alias", "keep_alive"}),
        ("post", "/models", {"pin", "keep_alive", "revision"}),
        ("post", "/models/load", {"model", "wait"}),
        ("post", "/models/unload", {"model", "rehome"}),
    ],
)
def test_bodies_are_described(document: Any, method: str, path: str, fields: set[str]) -> None:
    body = document["paths"][path][method]["requestBody"]["content"]["application/json"]
    schemas = document["components"]["schemas"]
    names = [reference.rsplit("/", 1)[1] for reference in references(body)]
    assert any(fields <= schemas[name]["properties"].keys() for name in names)


def test_every_reference_leads_somewhere(document: Any) -> None:
    found = set(references(document))
    assert found
    for reference in found:
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_every_route_is_listed_with_its_refusals(document: Any) -> None:
    listed = {"/health", "/ready", "/metrics", "/v1/models", "/models/jobs/{job_id}",
              "/models/jobs/{job_id}/cancel", "/models/events"}  # fmt: skip
    assert listed <= document["paths"].keys()
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "4XX", "5XX"} <= chat.keys()
    assert "text/event-stream" in chat["200"]["content"]


def test_keys_are_wanted_where_the_server_wants_them(document: Any) -> None:
    def security(path: str) -> Any:
        return document["paths"][path]["get"].get("security", [])

    assert security("/health") == []
    assert security("/models") == [{"key": []}]
    assert security("/ui/session") == [{}, {"key": []}]  # with one or without


def test_details_that_can_be_included_are_listed(document: Any) -> None:
    def choices(path: str) -> list[str]:
        [found] = [
            parameter["schema"]["items"].get("enum") or [parameter["schema"]["items"]["const"]]
            for parameter in document["paths"][path]["get"]["parameters"]
            if parameter["name"] == "include"
        ]
        return sorted(found)

    assert choices("/models") == ["blocks", "frontier"]
    assert choices("/models/{name}") == ["blocks", "frontier", "tensors"]
    assert choices("/analysis/{family}") == ["tensors"]
