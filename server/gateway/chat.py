"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from linker_core.errors import InvalidRequestError
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
from server.gateway.logprobs import chat_logprobs
from server.gateway.prompts import chat_prompt, sequences
from server.gateway.schemas import CHAT_NEUTRAL, ChatRequest, StreamOptions, parse_request
from server.gateway.services import Services
from server.gateway.streaming import DONE, EventStream, event, unless_disconnected
from server.onboarding.catalog import ServedModel


def chat_router(services: Services) -> APIRouter:
    """Returns the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(http_request: Request) -> Response:
        services.gate.check_open()
        body = await read_object(http_request)
        request = parse_request(ChatRequest, body, neutral=CHAT_NEUTRAL)
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        model = services.served(request.model)
        answer = ChatAnswer(services, request, model)
        await asyncio.to_thread(answer.prepare)
        if request.stream:
            return EventStream(answer.stream(), metrics=services.metrics)
        return JSONResponse(await unless_disconnected(http_request, answer.whole()))

    return router


class ChatAnswer:
    """One answer on its way, streamed or whole."""

    def __init__(self, services: Services, request: ChatRequest, model: ServedModel) -> None:
        self._services = services
        self._request = request
        self._model = model
        self._id = new_id("chatcmpl")
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
            [chat_prompt(request, self._model)],
            request_id=self._id,
            max_tokens=request.max_completion_tokens or request.max_tokens,
            default_max_tokens=None,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )

    async def whole(self) -> dict[str, Any]:
        """Returns the answer when all of it is there."""
        tally, choices = self._tally(), [Collected() for _ in self._specs]
        with self._services.gate.admit(len(self._specs)):
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    tally.count(delta)
                    choices[delta.index].add(delta)
        return self._envelope("chat.completion").wrap(
            [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text},
                    "logprobs": self._logprobs(choice.deltas),
                    "finish_reason": choice.finish_reason,
                    **token_ids(choice.deltas, wanted=self._request.return_token_ids),
                }
                for index, choice in enumerate(choices)
            ],
            usage=tally.usage(),
            **self._prompt_ids(),
        )

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yields the events; a choice's role comes together with its first token."""
        options = self._request.stream_options or StreamOptions()
        tally, begun = self._tally(), set[int]()
        envelope = self._envelope("chat.completion.chunk")
        with self._services.gate.admit(len(self._specs)):
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    tally.count(delta)
                    more: dict[str, Any] = {"usage": None} if options.include_usage else {}
                    if options.continuous_usage_stats:
                        more = {"usage": tally.usage()}
                    if not begun:
                        more |= self._prompt_ids()
                    choices = self._chunk_choices(delta, is_first=delta.index not in begun)
                    begun.add(delta.index)
                    if choices:
                        yield b"".join(event(envelope.wrap([c], **more)) for c in choices)
        if options.include_usage:
            yield event(envelope.wrap([], usage=tally.usage()))
        yield DONE

    def _chunk_choices(self, delta: Delta, *, is_first: bool) -> list[dict[str, Any]]:
        """Returns the choices of the chunks that one piece becomes."""

        def choice(content: dict[str, str], **more: Any) -> dict[str, Any]:
            return {
                "index": delta.index,
                "delta": content,
                "logprobs": None,
                "finish_reason": None,
                **more,
            }

        chunks = [choice({"role": "assistant", "content": ""})] if is_first else []
        logprobs = self._logprobs([delta])
        ids = token_ids([delta], wanted=self._request.return_token_ids)
        if delta.text or delta.finish_reason or logprobs or ids:
            content = {"content": delta.text} if delta.text else {}
            reason = delta.finish_reason
            chunks.append(choice(content, logprobs=logprobs, finish_reason=reason, **ids))
        return chunks

    def _deltas(self) -> AsyncGenerator[Delta, None]:
        services = self._services
        return generate(self._specs, client=services.engine.client, metrics=services.metrics)

    def _prompt_ids(self) -> dict[str, list[int]]:
        return prompt_token_ids(self._specs[0], wanted=self._request.return_token_ids)

    def _tally(self) -> Tally:
        return Tally(self._specs, choices_per_prompt=self._request.n or 1)

    def _envelope(self, kind: str) -> Envelope:
        return Envelope(id=self._id, object=kind, model=self._model.name)

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(
            [delta.token for delta in deltas],
            self._model.text.tokenizer,
            num_top=self._request.top_logprobs or 0,
        )
