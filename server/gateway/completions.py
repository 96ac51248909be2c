"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.gateway.answers import (
    Collected,
    Envelope,
    Tally,
    new_id,
    prompt_token_ids,
    token_ids,
)
from server.gateway.body import read_object
from server.gateway.generation import Delta, SequenceSpec, generate
from server.gateway.logprobs import CompletionLogprobs
from server.gateway.prompts import COMPLETION_MAX_TOKENS, completion_prompts, sequences
from server.gateway.schemas import (
    COMPLETION_NEUTRAL,
    CompletionRequest,
    StreamOptions,
    parse_request,
)
from server.gateway.services import Services
from server.gateway.streaming import DONE, EventStream, event, unless_disconnected
from server.onboarding.catalog import ServedModel


def completions_router(services: Services) -> APIRouter:
    """Returns the route."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(http_request: Request) -> Response:
        services.gate.check_open()
        body = await read_object(http_request)
        request = parse_request(CompletionRequest, body, neutral=COMPLETION_NEUTRAL)
        answer = CompletionAnswer(services, request, services.served(request.model))
        await asyncio.to_thread(answer.prepare)
        if request.stream:
            return EventStream(answer.stream(), metrics=services.metrics)
        return JSONResponse(await unless_disconnected(http_request, answer.whole()))

    return router


class CompletionAnswer:
    """One answer on its way, streamed or whole; choices are prompt-major."""

    def __init__(self, services: Services, request: CompletionRequest, model: ServedModel) -> None:
        self._services = services
        self._request = request
        self._model = model
        self._id = new_id("cmpl")
        self._specs: Sequence[SequenceSpec] = ()

    def prepare(self) -> None:
        """Tokenises and checks, off the event loop.

        Raises:
            LinkerError: The request does not suit the model.
        """
        request = self._request
        self._specs = sequences(
            request,
            self._model,
            completion_prompts(request, self._model),
            request_id=self._id,
            max_tokens=request.max_tokens,
            default_max_tokens=COMPLETION_MAX_TOKENS,
            logprobs=request.logprobs,
        )

    async def whole(self) -> dict[str, Any]:
        """Returns the answer when all of it is there."""
        tally, choices = self._tally(), [Collected() for _ in self._specs]
        with self._services.gate.admit(len(self._specs)):
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    tally.count(delta)
                    choices[delta.index].add(delta)
        logprobs = self._logprobs()
        return self._envelope().wrap(
            [
                {
                    "index": index,
                    "text": choice.text,
                    "logprobs": _take(logprobs, index, choice.deltas),
                    "finish_reason": choice.finish_reason,
                    **token_ids(choice.deltas, wanted=self._request.return_token_ids),
                    **self._prompt_ids(index),
                }
                for index, choice in enumerate(choices)
            ],
            usage=tally.usage(),
        )

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yields the events."""
        options = self._request.stream_options or StreamOptions()
        tally, logprobs, envelope = self._tally(), self._logprobs(), self._envelope()
        begun = set[int]()
        with self._services.gate.admit(len(self._specs)):
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    tally.count(delta)
                    record = _take(logprobs, delta.index, [delta])
                    ids = token_ids([delta], wanted=self._request.return_token_ids)
                    if not (delta.text or delta.finish_reason or record or ids):
                        continue
                    usage: dict[str, Any] = {"usage": None} if options.include_usage else {}
                    if options.continuous_usage_stats:
                        usage = {"usage": tally.usage()}
                    choice = {
                        "index": delta.index,
                        "text": delta.text,
                        "logprobs": record,
                        "finish_reason": delta.finish_reason,
                        **ids,
                    }
                    if delta.index not in begun:
                        begun.add(delta.index)
                        choice |= self._prompt_ids(delta.index)
                    yield event(envelope.wrap([choice], **usage))
        if options.include_usage:
            yield event(envelope.wrap([], usage=tally.usage()))
        yield DONE

    def _deltas(self) -> AsyncGenerator[Delta, None]:
        services = self._services
        return generate(self._specs, client=services.engine.client, metrics=services.metrics)

    def _prompt_ids(self, index: int) -> dict[str, list[int]]:
        return prompt_token_ids(self._specs[index], wanted=self._request.return_token_ids)

    def _tally(self) -> Tally:
        return Tally(self._specs, choices_per_prompt=self._request.n or 1)

    def _envelope(self) -> Envelope:
        return Envelope(id=self._id, object="text_completion", model=self._model.name)

    def _logprobs(self) -> list[CompletionLogprobs] | None:
        if self._request.logprobs is None:
            return None
        num_top, tokenizer = self._request.logprobs, self._model.text.tokenizer
        return [CompletionLogprobs(tokenizer, num_top=num_top) for _ in self._specs]


def _take(
    logprobs: Sequence[CompletionLogprobs] | None, index: int, deltas: Sequence[Delta]
) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return logprobs[index].take([delta.token for delta in deltas])
