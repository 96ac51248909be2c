"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from linker_core.errors import InvalidRequestError
from server.gateway.answers import Answer, Collected, Json
from server.gateway.body import read_object, work_on_body
from server.gateway.generation import Delta
from server.gateway.logprobs import CompletionLogprobs, ScoredToken
from server.gateway.openapi import answers, takes
from server.gateway.prefix import addressed
from server.gateway.prompts import (
    COMPLETION_MAX_TOKENS,
    Lengths,
    Reports,
    completion_prompts,
    sequences,
    truncated,
)
from server.gateway.schemas.generation import COMPLETION_NEUTRAL, CompletionRequest
from server.gateway.schemas.parsing import parse_request
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
        body = addressed(http_request, await read_object(http_request), services)
        parse = partial(parse_request, CompletionRequest, body, neutral=COMPLETION_NEUTRAL)
        request = await work_on_body(http_request, parse)
        return await CompletionAnswer.respond(services, request, http_request)

    return router


class CompletionAnswer(Answer[CompletionRequest]):
    """A text completion; choices are prompt-major."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    @property
    def num_chars(self) -> int:
        prompt = self._request.prompt
        if isinstance(prompt, str):
            return len(prompt)
        return sum(len(one) for one in prompt if isinstance(one, str))

    @property
    def is_light(self) -> bool:
        return super().is_light and isinstance(self._request.prompt, str)

    def prepare(self) -> None:
        request, model = self._request, self._model
        if request.max_tokens == 0 and not request.echo:
            raise InvalidRequestError(
                "max_tokens is 0 and the prompt is not echoed, so there is nothing to answer.",
                param="max_tokens",
            )
        whole = completion_prompts(request, model)
        max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        prompts = [truncated(one, request, model, max_tokens=max_tokens) for one in whole]
        self._specs = sequences(
            request,
            model,
            prompts,
            request_id=self._id,
            lengths=Lengths(asked=request.max_tokens, default=COMPLETION_MAX_TOKENS),
            reports=Reports(logprobs=request.logprobs, prompt_logprobs=_num_prompt_top(request)),
        )
        self._echoes = self._echoed_texts(whole) if request.echo else [""] * len(self._specs)
        self._logprobs: list[CompletionLogprobs] | None = None
        if request.logprobs is not None:
            tokenizer, num_top = model.text.tokenizer, request.logprobs
            self._logprobs = [CompletionLogprobs(tokenizer, num_top=num_top) for _ in self._specs]

    def _choice(self, index: int, collected: Collected) -> Json:
        return {
            "index": index,
            "text": self._echoes[index] + collected.text,
            "logprobs": self._take_logprobs(index, collected.deltas),
            "finish_reason": collected.finish_reason,
            **self._token_ids(collected.deltas),
            **self._prompt_ids(index),
            **self._prompt_logprobs(collected.deltas[0]),
        }

    def _chunk_choices(self, delta: Delta, *, is_first: bool) -> list[Json]:
        text = self._echoes[delta.index] + delta.text if is_first else delta.text
        logprobs = self._take_logprobs(delta.index, [delta])
        ids = self._token_ids([delta])
        if not (text or delta.finish_reason or logprobs or ids):
            return []
        choice = {
            "index": delta.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            **ids,
        }
        return [choice | self._prompt_ids(delta.index) if is_first else choice]

    def _take_logprobs(self, index: int, deltas: Sequence[Delta]) -> Json | None:
        if self._logprobs is None:
            return None
        tokens: list[ScoredToken] = []
        for delta in deltas:
            prompt = delta.token.prompt_logprobs
            if self._request.echo and prompt is not None:
                tokens += ScoredToken.of_prompt(self._specs[index].prompt_ids[0], prompt)
            if delta.is_answer:
                tokens.append(ScoredToken.of_answer(delta.token))
        return self._logprobs[index].take(tokens)

    def _echoed_texts(self, whole: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of every choice's prompt: as given, or else as its tokens read.

        Args:
            whole: The prompts' tokens before they were truncated.
        """
        prompt, n = self._request.prompt, self._request.n or 1
        given = [prompt] if isinstance(prompt, str) else prompt
        decode = self._model.text.tokenizer.decode
        skip = self._request.skip_special_tokens is not False
        texts: list[str] = []
        for place, spec in enumerate(self._specs[::n]):
            text = given[place]
            if not isinstance(text, str) or len(spec.prompt_ids) < len(whole[place]):
                text = decode(spec.prompt_ids, skip_special_tokens=skip)
            texts += [text] * n
        return texts


def _num_prompt_top(request: CompletionRequest) -> int | None:
    """Returns how many alternatives the engine reports for the prompt's tokens."""
    asked = [request.prompt_logprobs, request.logprobs if request.echo else None]
    return max((number for number in asked if number is not None), default=None)
