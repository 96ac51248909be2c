"""POST /tokenize, POST /detokenize, GET /tokenizer_info: a model's tokenizer from afar.

Whoever scores texts with a model needs its tokens. No model has to be resident for that as long as
its tokenizer is remembered; one that left long ago is loaded.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from linker_core.errors import NotReadyError
from server.gateway.body import read_object, work_on_body
from server.gateway.holding import hold
from server.gateway.listing import servable
from server.gateway.openapi import answers, takes
from server.gateway.prefix import addressed, prefix_model
from server.gateway.prompts import chat_text
from server.gateway.sampling import check_token_ids
from server.gateway.schemas.parsing import parse_request
from server.gateway.schemas.tokenization import (
    TOKENIZE_NEUTRAL,
    DetokenizeBody,
    TokenizeChatBody,
    TokenizeTextBody,
)
from server.gateway.services import Services
from server.gateway.streaming import unless_disconnected
from server.residency.catalog import ServedModel


def tokenization_router(services: Services) -> APIRouter:
    """Returns the routes."""
    router = APIRouter()

    @router.post(
        "/tokenize",
        openapi_extra=takes(TokenizeTextBody, TokenizeChatBody),
        responses=answers(200, "The tokens of a text, or of a dialogue as the model reads it."),
    )
    async def tokenize(http_request: Request) -> Response:
        body = addressed(http_request, await read_object(http_request), services)
        if body.get("messages") is None:
            return await _tokenize_text(services, http_request, body)
        return await _tokenize_chat(services, http_request, body)

    @router.post(
        "/detokenize",
        openapi_extra=takes(DetokenizeBody),
        responses=answers(200, "The text of tokens, special ones included."),
    )
    async def detokenize(http_request: Request) -> Response:
        body = addressed(http_request, await read_object(http_request), services)
        request = await work_on_body(http_request, partial(parse_request, DetokenizeBody, body))
        model = await _model(services, http_request, request.model)
        return await asyncio.to_thread(_detokenized, model, request.tokens)

    @router.get(
        "/tokenizer_info", responses=answers(200, "What a client needs to build prompts itself.")
    )
    async def tokenizer_info(http_request: Request) -> Response:
        model = await _model(services, http_request, prefix_model(http_request))
        return JSONResponse(_info(model))

    return router


async def _tokenize_text(
    services: Services, http_request: Request, body: dict[str, Any]
) -> JSONResponse:
    parse = partial(parse_request, TokenizeTextBody, body, neutral=TOKENIZE_NEUTRAL)
    request = await work_on_body(http_request, parse)
    model = await _model(services, http_request, request.model)
    return await _tokenized(
        services,
        http_request,
        model,
        request.prompt,
        add_special_tokens=request.add_special_tokens is not False,
        with_texts=request.return_token_strs is True,
    )


async def _tokenize_chat(
    services: Services, http_request: Request, body: dict[str, Any]
) -> JSONResponse:
    parse = partial(parse_request, TokenizeChatBody, body, neutral=TOKENIZE_NEUTRAL)
    request = await work_on_body(http_request, parse)
    model = await _model(services, http_request, request.model)
    return await _tokenized(
        services,
        http_request,
        model,
        await chat_text(request, model, services.templates),
        add_special_tokens=request.add_special_tokens is True,
        with_texts=request.return_token_strs is True,
    )


async def _model(services: Services, http_request: Request, name: str | None) -> ServedModel:
    """Returns the model that is meant: by default the first donor, as `/v1/models` lists it first.

    Raises:
        NotReadyError: No model can be served.
        LinkerError: See `hold`.
    """
    services.gate.check_open()
    if name is None:
        name = next((record.name for record in servable(services)), None)
        if name is None:
            raise NotReadyError("No model can be served.")
    owner = services.roster.named(name).name
    known = services.catalog.get(owner) or services.catalog.dormant(owner)
    if known is not None:
        return known
    async with AsyncExitStack() as until_read:  # its tokenizer stays when the model goes
        return await hold(services, http_request, name, until_read, mode=None)


async def _tokenized(
    services: Services,
    http_request: Request,
    model: ServedModel,
    text: str,
    *,
    add_special_tokens: bool,
    with_texts: bool,
) -> JSONResponse:
    tokenizer = model.text.tokenizer

    def work() -> JSONResponse:
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        names = [tokenizer.token_name(one) for one in ids] if with_texts else None
        answer = {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids}
        return JSONResponse(answer | {"token_strs": names})

    working = services.text_threads.run(work, tokenizer=tokenizer, num_chars=len(text))
    return await unless_disconnected(http_request, working)


def _detokenized(model: ServedModel, ids: list[int]) -> JSONResponse:
    check_token_ids(ids, model, param="tokens")
    return JSONResponse({"prompt": model.text.tokenizer.decode(ids, skip_special_tokens=False)})


def _info(model: ServedModel) -> dict[str, object]:
    tokenizer, template = model.text.tokenizer, model.text.template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads every tokenizer.json
        "model": model.name,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "model_max_length": model.max_model_len,
        "max_model_len": model.max_model_len,
        "chat_template": None if template is None else template.text,
    }
