"""One answer on its way to the client, whole or streamed: what chat and completions share."""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import Response

from linker_core.errors import InvalidRequestError, LinkerError
from server.bridge.client import EngineClient
from server.gateway.caller import EVERYBODY, caller_of
from server.gateway.deadlines import Deadlines, deadlines_of
from server.gateway.generation import Delta, SequenceSpec, generate
from server.gateway.holding import hold, to_be_loaded
from server.gateway.logprobs import prompt_logprobs
from server.gateway.schemas.generation import GenerationRequest, StreamOptions
from server.gateway.services import Services
from server.gateway.shared_prompts import SharedPrompts
from server.gateway.streaming import DONE, EventStream, event, unless_disconnected
from server.gateway.text_threads import SHORT_CHARS
from server.gateway.tracing import begin_answer, followed
from server.residency.catalog import ServedModel
from server.tracing.request import AnswerTrace

_Request = TypeVar("_Request", bound=GenerationRequest)
Json = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Collected:
    """One finished choice."""

    parts: list[str] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Appends a piece."""
        self.parts.append(delta.text)
        self.deltas.append(delta)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value

    @property
    def text(self) -> str:
        """All of the text."""
        return "".join(self.parts)


class Answer(ABC, Generic[_Request]):
    """The sequences of one request and the records that they become.

    Args:
        services: Of the server.
        request: The checked body.
        model: Who answers, resident until the answer has ended.
        deadlines: What the request has left.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self, services: Services, request: _Request, model: ServedModel, deadlines: Deadlines
    ) -> None:
        self._services = services
        self._request = request
        self._model = model
        self._deadlines = deadlines
        self._caller = EVERYBODY
        # An id of our own making; clients' ids are never used inside. Nothing rests on its being
        # secret, so the system is not asked for chance.
        self._id = f"{self.id_prefix}-{random.getrandbits(128):032x}"
        self._created = int(time.time())
        self._specs: Sequence[SequenceSpec] = ()
        self._num_cached: dict[int, int] = {}  # prompt tokens found in the cache, by choice
        self._trace: AnswerTrace | None = None  # None: nobody wants to know what happens

    async def read(self) -> None:
        """Makes a text of what the request says, before `prepare`.

        Raises:
            LinkerError: The request does not suit the model.
        """

    async def prepare_off_loop(self, http_request: Request) -> None:
        """Runs `prepare` in a thread, unless that would take longer than what it does.

        Raises:
            LinkerError: See `prepare`.
            ClientLeftError: A long text has waited for its turn, and nobody waits for it now.
        """
        num_chars = self.num_chars
        preparing = self._services.text_threads.run(
            self.prepare,
            tokenizer=self._model.text.tokenizer,
            num_chars=num_chars,
            is_light=self.is_light,
        )
        # Whoever leaves is to leave no queue of texts behind; to look for that takes its time, too.
        await (
            preparing if num_chars <= SHORT_CHARS else unless_disconnected(http_request, preparing)
        )

    @property
    def is_light(self) -> bool:
        """Whether `prepare` does next to nothing but tokenise `num_chars`."""
        request = self._request
        heavy = (
            request.bad_words,
            request.allowed_token_ids,
            request.logit_bias,
            request.response_format,
            request.structured_outputs,
        )
        return not any(heavy)

    @property
    @abstractmethod
    def num_chars(self) -> int:
        """How many characters `prepare` tokenises."""

    @abstractmethod
    def prepare(self) -> None:
        """Tokenises and checks; blocking, so it runs off the event loop.

        Raises:
            LinkerError: The request does not suit the model.
        """

    @abstractmethod
    def _choice(self, index: int, collected: Collected) -> Json:
        """Returns a finished choice."""

    @abstractmethod
    def _chunk_choices(self, delta: Delta, *, is_first: bool) -> list[Json]:
        """Returns the choices of the chunks that one piece becomes; none if it shows nothing."""

    def _beside_choices(self, first: Delta) -> Json:  # noqa: ARG002 - for those who override it
        """Returns what the answer, or its first chunk, carries beside the choices.

        Args:
            first: The first piece of a choice.
        """
        return {}

    @classmethod
    async def respond(
        cls, services: Services, request: _Request, http_request: Request
    ) -> Response:
        """Answers, streamed or whole as the client wishes, by a model that stays until then.

        What cannot be answered anyhow brings no evicted model back.

        Raises:
            LinkerError: The request cannot be answered.
            ClientLeftError: Nobody waits for the answer any more.
        """
        caller = caller_of(http_request)
        caller.check_priority(request.priority or 0)
        services.gate.check(caller)
        limits = services.settings.http
        deadlines = deadlines_of(http_request, limits, arrived_at=time.monotonic())
        evicted = to_be_loaded(services, request.model, mode=request.variant_mode)
        if evicted is not None:
            early = cls(services, request, evicted, deadlines)
            await early.read()
            await early.prepare_off_loop(http_request)
        async with AsyncExitStack() as until_answered:
            async with deadlines.bounding():
                mode, name = request.variant_mode, request.model
                model = await hold(services, http_request, name, until_answered, mode=mode)
            answer = cls(services, request, model, deadlines)
            return await answer.begin(http_request, until_answered)

    async def begin(self, http_request: Request, until_answered: AsyncExitStack) -> Response:
        """Answers; a stream takes over what is to be closed at its end.

        Raises:
            LinkerError: See `respond`, as `ClientLeftError`.
        """
        services, request = self._services, self._request
        name = self._model.name
        self._trace = begin_answer(http_request, request, model=name, response_id=self._id)
        await self.read()
        await self.prepare_off_loop(http_request)
        caller = self._caller = caller_of(http_request)
        self._specs = [
            replace(
                spec,
                cache_salt=caller.cache_salt(spec.cache_salt),
                tenant=caller.key_id or "",
                arrived_at=self._deadlines.arrived_at,
                start_within_s=self._deadlines.start_within_s,
            )
            for spec in self._specs
        ]
        if request.stream:
            if request.prompt_logprobs is not None:
                raise InvalidRequestError(
                    "prompt_logprobs come with whole answers; leave stream out.",
                    param="prompt_logprobs",
                )
            return EventStream(
                self.stream(),
                metrics=services.metrics,
                until_sent=until_answered.pop_all(),
            )
        if request.stream_options is not None:
            raise InvalidRequestError(
                "stream_options is only for stream: true.", param="stream_options"
            )
        whole = await unless_disconnected(http_request, self.whole())
        return Response(whole, media_type="application/json")

    async def whole(self) -> bytes:
        """Returns the answer, as JSON, when all of it is there.

        Raises:
            LinkerError: A sequence failed.
        """
        collected = [Collected() for _ in self._specs]
        num_tokens = 0
        async with aclosing(self._deltas()) as batches:
            async for deltas in batches:
                for delta in deltas:
                    num_tokens += delta.is_answer
                    collected[delta.index].add(delta)
        if not self._is_work(collected):
            return self._whole(collected, num_tokens)
        return await asyncio.to_thread(self._whole, collected, num_tokens)

    def _is_work(self, collected: Sequence[Collected]) -> bool:  # noqa: ARG002 - for overriding
        """Says whether finished choices take so long to write that no loop must wait for it.

        Here: whether each token, of a prompt maybe, has its text to be found.
        """
        sampling = self._specs[0].sampling
        return sampling.logprobs is not None or sampling.prompt_logprobs is not None

    def _whole(self, collected: Sequence[Collected], num_tokens: int) -> bytes:
        choices = [self._choice(index, choice) for index, choice in enumerate(collected)]
        more = {"usage": self._usage(num_tokens)} | self._beside_choices(collected[0].deltas[0])
        return orjson.dumps(self._record(self.whole_object, choices, more))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yields encoded events, those that wait together as one write, `[DONE]` last.

        Raises:
            LinkerError: A sequence failed.
        """
        options = self._request.stream_options or StreamOptions()
        begun: set[int] = set()
        num_tokens, num_running = 0, len(self._specs)
        events: list[bytes] = []
        async with aclosing(self._deltas()) as batches:
            async for deltas in batches:
                for delta in deltas:
                    num_tokens += delta.is_answer
                    num_running -= delta.finish_reason is not None
                    more: Json = {"usage": None} if options.include_usage else {}
                    if options.include_usage and options.continuous_usage_stats:
                        more = {"usage": self._usage(num_tokens)}
                    beside = {} if begun else self._beside_choices(delta)
                    is_first = delta.index not in begun
                    begun.add(delta.index)
                    if delta.token.prompt_logprobs is None:
                        choices = self._chunk_choices(delta, is_first=is_first)
                    else:
                        work = partial(self._chunk_choices, delta, is_first=is_first)
                        choices = await asyncio.to_thread(work)
                    if beside:  # with the very first chunk alone
                        first, *choices = choices
                        events.append(self._event([first], more | beside))
                    events += [self._event([choice], more) for choice in choices]
                if events and num_running:  # what comes after the last is written with it
                    yield b"".join(events)
                    events.clear()
        if options.include_usage:
            events.append(self._event([], {"usage": self._usage(num_tokens)}))
        yield b"".join([*events, DONE])

    async def _deltas(self) -> AsyncGenerator[list[Delta], None]:
        """Runs the sequences while they hold places among those in flight; see `generate`."""
        services = self._services
        prompts = self._specs[:: self._request.n or 1]
        prompt_tokens = sum(len(spec.prompt_ids) for spec in prompts)
        with services.gate.admit(
            len(self._specs),
            prompt_tokens=prompt_tokens,
            answer_tokens=sum(spec.sampling.max_tokens for spec in self._specs),
            caller=self._caller,
        ) as place:
            client = services.engine.serving_client
            pieces = generate(self._specs, client=client, metrics=services.metrics)
            if self._trace is not None:
                self._trace.num_choices = len(self._specs)
                pieces = followed(pieces, self._trace, usage=self._usage)
            reports = self._specs[0].sampling.prompt_logprobs is not None
            shared = SharedPrompts(self._request.n or 1) if reports else None
            with self._deadlines.watching(partial(self._fail, client)) as watch:
                async with aclosing(pieces):
                    async for deltas in pieces:
                        watch.came()
                        num_cached = deltas[0].token.num_cached_tokens
                        if num_cached is not None:
                            self._num_cached[deltas[0].index] = num_cached
                            place.begun()
                        place.answered(len(deltas))
                        ready = deltas if shared is None else shared.take(deltas)
                        if ready:
                            yield ready
                        watch.awaits()

    def _fail(self, client: EngineClient, error: LinkerError) -> None:
        for spec in self._specs:
            client.fail(spec.request_id, error)

    def _event(self, choices: list[Json], more: Json) -> bytes:
        return event(self._record(self.chunk_object, choices, more))

    def _record(self, kind: str, choices: list[Json], more: Json) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "choices": choices,
            **more,
        }

    def _usage(self, num_tokens: int) -> Json:
        """Returns the counts so far; a prompt with several choices counts once."""
        n, prompts = self._request.n or 1, self._specs[:: self._request.n or 1]
        num_prompt = sum(len(spec.prompt_ids) for spec in prompts)
        # Choices find what the first of them computed; the fewest were found by that one.
        found = [[self._num_cached.get(spec.index + k, 0) for k in range(n)] for spec in prompts]
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(map(min, found))},
        }

    def _token_ids(self, deltas: Sequence[Delta]) -> dict[str, list[int]]:
        """Returns the field of the tokens' ids, stop tokens included, where it is asked for."""
        if not self._request.return_token_ids:
            return {}
        return {"token_ids": [delta.token.token_id for delta in deltas if delta.is_answer]}

    def _prompt_ids(self, index: int) -> dict[str, list[int]]:
        """Returns the field of a prompt's ids as the model sees them, where it is asked for."""
        if not self._request.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self._specs[index].prompt_ids)}

    def _prompt_logprobs(self, first: Delta) -> Json:
        """Returns the field of a prompt's log-probabilities, where it is asked for.

        Args:
            first: The first piece of a choice of that prompt.
        """
        num_top, prompt = self._request.prompt_logprobs, first.token.prompt_logprobs
        if num_top is None or prompt is None:
            return {}
        tokenizer = self._model.text.tokenizer
        return {"prompt_logprobs": prompt_logprobs(prompt, tokenizer, num_top=num_top)}
