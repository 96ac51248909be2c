"""What /openapi.json says of bodies: routes read them on their own, so FastAPI cannot know.

Knows no request; the records that check them describe them here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

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
    """Returns `responses` of a route: its success as described, failures as everywhere."""
    kinds = ("application/json", "text/event-stream") if stream else ("application/json",)
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {
        status: {"description": description, "content": {kind: {} for kind in kinds}},
        "4XX": {"description": "The request was refused.", "content": error},
        "5XX": {"description": "The server could not answer.", "content": error},
    }


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
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
