"""What /openapi.json says of bodies: routes read them on their own, so FastAPI cannot know.

Knows no request; the records that check them describe them here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.gateway.access import Audience, audience_of
from server.gateway.schemas.chat import ChatRequest
from server.gateway.schemas.generation import CompletionRequest
from server.gateway.schemas.operators import (
    ChangeBody,
    FitBody,
    LoadBody,
    OnboardBody,
    PlanBody,
    UnloadBody,
)
from server.gateway.schemas.scores import ScoresBody
from server.gateway.schemas.tokenization import (
    DetokenizeBody,
    TokenizeChatBody,
    TokenizeTextBody,
)

_BODIES: tuple[type[BaseModel], ...] = (
    ChangeBody,
    ChatRequest,
    CompletionRequest,
    FitBody,
    LoadBody,
    OnboardBody,
    PlanBody,
    ScoresBody,
    DetokenizeBody,
    TokenizeChatBody,
    TokenizeTextBody,
    UnloadBody,
)
_REF = "#/components/schemas/{model}"
_KEY_SCHEME = {"type": "http", "scheme": "bearer", "description": "Where the server wants keys."}
_METHODS = frozenset({"get", "post", "put", "patch", "delete"})
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def takes(*bodies: type[BaseModel]) -> dict[str, Any]:
    """Returns `openapi_extra` of a route that reads one of these bodies itself."""
    assert set(bodies) <= set(_BODIES)
    refs = [{"$ref": _REF.format(model=body.__name__)} for body in bodies]
    schema = refs[0] if len(refs) == 1 else {"oneOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers(status: int, description: str, *, stream: bool = False) -> dict[int | str, Any]:
    """Returns `responses` of a route: its success as described."""
    kinds = ("application/json", "text/event-stream") if stream else ("application/json",)
    return {status: {"description": description, "content": {kind: {} for kind in kinds}}}


def describe_bodies(app: FastAPI) -> None:
    """Adds the bodies' schemas to the application's document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, definitions = models_json_schema(
                [(body, "validation") for body in _BODIES], ref_template=_REF
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"] | {"Error": _ERROR_SCHEMA})
            document["components"]["securitySchemes"] = {"key": _KEY_SCHEME}
            for path, methods in document["paths"].items():
                for method in methods.keys() & _METHODS:
                    _describe_common(methods[method], method, path)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_common(operation: dict[str, Any], method: str, path: str) -> None:
    """Adds what every route has: refusals in one shape, and a key unless anyone may ask."""
    refused = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    failed: dict[str, Any] = {"application/json": {}}  # an error, or of /ready a reason
    responses = operation["responses"]
    responses.pop("422", None)  # what FastAPI would answer to a bad query, which is 400 here
    responses["4XX"] = {"description": "The request was refused.", "content": refused}
    responses["5XX"] = {"description": "The server could not answer.", "content": failed}
    audience = audience_of(method.upper(), path)
    if audience is not Audience.ANYONE:
        without: list[dict[str, list[str]]] = [{}] if audience is Audience.VISITORS else []
        operation["security"] = [*without, {"key": []}]
