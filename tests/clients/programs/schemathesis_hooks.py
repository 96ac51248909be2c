"""What schemathesis is told so that its requests get further than the first check.

Loaded by it, in its own environment. Most names that it makes up are replaced by names that there
are; which one, depends on what was made up, so that a seed gives the same requests again.
"""

from __future__ import annotations

import json
from typing import Any
from zlib import crc32

import schemathesis

MODELS = ("base", "near", "attack", "base", "near")
SOURCES = ("near", "../near", "nothing", "base/../nothing", "/etc", "hub:acme/x@", "nowhere", "x y")
COSTLY = ("policy", "budget_kl", "max_bytes", "tau_cos", "tau_frob", "tier", "revision")
DESTROYING = ("DELETE", "PATCH")


def _chosen(from_: tuple[str, ...], seed: object) -> str:
    return from_[crc32(json.dumps(seed, default=str).encode()) % len(from_)]


def _is_kept(seed: object) -> bool:
    """Whether one in four stays as it was made up."""
    return crc32(repr(seed).encode()) % 4 == 0


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Names a model, or a source, where the body has room for one."""
    if not isinstance(body, dict) or _is_kept(body):
        return body
    operation = context.operation
    if "source" in body and isinstance(body["source"], str):
        body["source"] = _chosen(SOURCES, body)
    if operation.path in ("/models", "/models/plan", "/models/{name}"):
        for option in COSTLY:  # each plan of the other kinds takes a process and a second
            body.pop(option, None)
        if "source" in body:
            body["policy"] = "exact"
    if operation.path == "/models" and "name" in body:
        body["name"] = "attack"
    if "model" in body or operation.path.startswith("/v1"):
        body["model"] = "attack" if operation.path == "/models/unload" else _chosen(MODELS, body)
    return body


@schemathesis.hook
def map_path_parameters(
    context: Any, path_parameters: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Names a model in the path; those that everybody uses are neither deleted nor changed."""
    if path_parameters is None or "name" not in path_parameters:
        return path_parameters
    destroys = context.operation.method.upper() in DESTROYING
    if destroys:
        path_parameters["name"] = "attack"
    elif not _is_kept(path_parameters):
        path_parameters["name"] = _chosen(MODELS, path_parameters)
    return path_parameters


@schemathesis.hook
def map_query(_context: Any, query: dict[str, Any] | None) -> dict[str, Any] | None:
    """Waits for no job."""
    if query is not None:
        query.pop("wait", None)
    return query
