"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.gateway.answers import Answer, Collected, Json
from server.gateway.body import read_object
from server.gateway.generation import Delta
from server.gateway.logprobs import CompletionLogprobs
from server.gateway.openapi import answers, takes
from server.gateway.prompts import COMPLETION_MAX_TOKENS, completion_prompts, sequences
from server.gateway.schemas import COMPLETION_NEUTRAL, CompletionRequest, parse_request
from server.gateway.services import Services


def completions_router(services: Services) -> APIRouter:
    """Returns the route."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        openapi_extra=takes(CompletionRequest),
        responses=answers(200, "The answer, or its pieces as events.", stream=True),
    )
    async def completions(http_request: Request) -> Response:
        services.gate.check_open()
        body = await read_object(http_request)
        request = parse_request(CompletionRequest, body, neutral=COMPLETION_NEUTRAL)
        answer = CompletionAnswer(services, request, services.served(request.model))
        return await answer.respond(http_request)

    return router


class CompletionAnswer(Answer[CompletionRequest]):
    """A text completion; choices are prompt-major."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def prepare(self) -> None:
        request, tokenizer = self._request, self._model.text.tokenizer
        self._specs = sequences(
            request,
            self._model,
            completion_prompts(request, self._model),
            request_id=self._id,
            max_tokens=request.max_tokens,
            default_max_tokens=COMPLETION_MAX_TOKENS,
            logprobs=request.logprobs,
        )
        self._logprobs: list[CompletionLogprobs] | None = None
        if request.logprobs is not None:
            num_top = request.logprobs
            self._logprobs = [CompletionLogprobs(tokenizer, num_top=num_top) for _ in self._specs]

    def _choice(self, index: int, collected: Collected) -> Json:
        return {
            "index": index,
            "text": collected.text,
            "logprobs": self._take_logprobs(index, collected.deltas),
            "finish_reason": collected.finish_reason,
            **self._token_ids(collected.deltas),
            **self._prompt_ids(index),
        }

    def _chunk_choices(self, delta: Delta, *, is_first: bool) -> list[Json]:
        logprobs = self._take_logprobs(delta.index, [delta])
        ids = self._token_ids([delta])
        if not (delta.text or delta.finish_reason or logprobs or ids):
            return []
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            **ids,
        }
        return [choice | self._prompt_ids(delta.index) if is_first else choice]

    def _take_logprobs(self, index: int, deltas: Sequence[Delta]) -> Json | None:
        if self._logprobs is None:
            return None
        return self._logprobs[index].take([delta.token for delta in deltas])
