"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.gateway.answers import Answer, Collected, Json
from server.gateway.body import read_object, work_on_body
from server.gateway.generation import Delta
from server.gateway.logprobs import chat_logprobs
from server.gateway.openapi import answers, takes
from server.gateway.prefix import addressed
from server.gateway.prompts import (
    Lengths,
    Reports,
    chat_prompt,
    chat_text,
    sequences,
    truncated,
)
from server.gateway.schemas.chat import CHAT_NEUTRAL, ChatRequest
from server.gateway.schemas.parsing import parse_request
from server.gateway.services import Services
from server.gateway.tools.records import ChoiceCalls
from server.gateway.tools.use import tool_use, with_tools

_MAX_INLINE_CHARS = 4096  # a millisecond of looking for calls of tools


def chat_router(services: Services) -> APIRouter:
    """Returns the route."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        openapi_extra=takes(ChatRequest),
        responses=answers(200, "The answer, or its pieces as events.", stream=True),
    )
    async def chat_completions(http_request: Request) -> Response:
        services.gate.check_open()
        body = addressed(http_request, await read_object(http_request), services)
        parse = partial(parse_request, ChatRequest, body, neutral=CHAT_NEUTRAL)
        request = await work_on_body(http_request, parse)
        return await ChatAnswer.respond(services, request, http_request)

    return router


class ChatAnswer(Answer[ChatRequest]):
    """A chat answer; a choice's role comes together with its first token."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    async def read(self) -> None:
        templates = self._services.templates
        self._text = await chat_text(self._request, self._model, templates)

    @property
    def num_chars(self) -> int:
        return len(self._text)

    @property
    def is_light(self) -> bool:
        return super().is_light and not self._request.tools

    def prepare(self) -> None:
        request, model = self._request, self._model
        max_tokens = request.max_completion_tokens or request.max_tokens
        prompt = truncated(
            chat_prompt(request, model, self._text), request, model, max_tokens=max_tokens
        )
        num_top = (request.top_logprobs or 0) if request.logprobs else None
        specs = sequences(
            request,
            model,
            [prompt],
            request_id=self._id,
            lengths=Lengths(asked=max_tokens, default=None),
            reports=Reports(logprobs=num_top, prompt_logprobs=request.prompt_logprobs),
        )
        assert model.text.template is not None  # or there would be no text
        self._use = tool_use(request, model.text.template.text)
        self._specs = specs if self._use is None else with_tools(specs, self._use)
        self._calls = [] if self._use is None else [ChoiceCalls(self._use.parser()) for _ in specs]

    def _is_work(self, collected: Sequence[Collected]) -> bool:
        if self._use is None:
            return super()._is_work(collected)
        num_chars = sum(len(part) for choice in collected for part in choice.parts)
        return num_chars > _MAX_INLINE_CHARS or super()._is_work(collected)

    def _choice(self, index: int, collected: Collected) -> Json:
        if self._use is None:
            message = {"role": "assistant", "content": collected.text, "refusal": None}
        else:
            message = self._calls[index].message(collected.text)
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(collected.deltas),
            "finish_reason": self._ended(index, collected.finish_reason),
            **self._token_ids(collected.deltas),
        }

    def _chunk_choices(self, delta: Delta, *, is_first: bool) -> list[Json]:
        def choice(shown: Json, **more: Any) -> Json:
            return {
                "index": delta.index,
                "delta": shown,
                "logprobs": None,
                "finish_reason": None,
                **more,
            }

        chunks = [choice({"role": "assistant", "content": ""})] if is_first else []
        *shown, last = self._shown(delta)
        chunks += map(choice, shown)
        logprobs, ids = self._logprobs([delta]), self._token_ids([delta])
        if last or delta.finish_reason or logprobs or ids:
            reason = self._ended(delta.index, delta.finish_reason)
            chunks.append(choice(last, logprobs=logprobs, finish_reason=reason, **ids))
        return chunks

    def _shown(self, delta: Delta) -> list[Json]:
        """Returns what a piece adds to the message, one or more records, the last maybe empty."""
        if self._use is None:
            return [{"content": delta.text} if delta.text else {}]
        calls = self._calls[delta.index]
        return calls.deltas(delta.text, is_last=delta.finish_reason is not None) or [{}]

    def _ended(self, index: int, reason: str | None) -> str | None:
        if self._use is None or reason is None:
            return reason
        return self._use.finish_reason(reason, has_called=self._calls[index].has_called)

    def _record(self, kind: str, choices: list[Json], more: Json) -> Json:
        record = super()._record(kind, choices, more)
        if kind == self.whole_object:  # there is one tier, and nothing that a fingerprint would say
            record |= {"service_tier": None, "system_fingerprint": None}
        return record

    def _beside_choices(self, first: Delta) -> Json:
        return self._prompt_ids(0) | self._prompt_logprobs(first)

    def _logprobs(self, deltas: Sequence[Delta]) -> Json | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(
            [delta.token for delta in deltas],
            self._model.text.tokenizer,
            num_top=self._request.top_logprobs or 0,
        )
