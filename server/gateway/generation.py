"""From a request's tokens to pieces of text: one sequence, or several merged. Knows no JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from linker_core.engine.messages import FinishReason, SamplingParams, TokenOutput
from linker_core.errors import InvalidRequestError
from linker_core.text.detokenizer import Detokenizer
from server.bridge.client import EngineClient
from server.gateway.formats import ANSWER_LINE, STRUCTURED_OUTPUTS
from server.metrics.serving import ServingMetrics
from server.residency.catalog import ServedModel

_MERGE_DEPTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How tokens become text."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec:
    """One sequence to generate; `index` is its place among the choices."""

    request_id: str
    index: int
    model: ServedModel
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    text: TextOptions
    arrived_at: float  # monotonic seconds
    priority: int = 0  # smaller is sooner
    cache_salt: str = ""
    tenant: str = ""  # whose it is
    start_within_s: float | None = None  # what it may wait for its first step; None: for ever
    grammar_param: str | None = None  # the field that asked for the grammar, if there is one
    answer_param: str | None = None  # another, that asked for what stands in its `ANSWER_LINE`
    prompt_only: bool = False  # the one token that is generated is no answer


class Delta(NamedTuple):
    """What one token added to one sequence; a tuple, since there is one for every token."""

    index: int  # type: ignore[assignment]  # nobody looks for a value in a tuple of these
    token: TokenOutput
    text: str  # may be empty: held back, or not text
    finish_reason: FinishReason | None
    is_answer: bool = True  # False: the token came for what it says of the prompt


async def generate(
    specs: Sequence[SequenceSpec], *, client: EngineClient, metrics: ServingMetrics
) -> AsyncGenerator[list[Delta], None]:
    """Runs all sequences and yields their pieces as they come; closing it aborts what runs.

    Pieces that wait together come together, each list those of one sequence.

    Raises:
        Exception: A sequence failed, most often with a `LinkerError`; the others are aborted.
    """
    streams = [_run(spec, client=client, metrics=metrics) for spec in specs]
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for deltas in only:
                yield deltas
        return
    arrivals: asyncio.Queue[list[Delta] | Exception | None] = asyncio.Queue(_MERGE_DEPTH)
    pumps = [asyncio.create_task(_pump(stream, arrivals)) for stream in streams]
    try:
        running = len(pumps)
        while running:
            arrival = await arrivals.get()
            if arrival is None:
                running -= 1
            elif isinstance(arrival, Exception):
                raise arrival
            else:
                yield arrival
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    stream: AsyncGenerator[list[Delta], None],
    arrivals: asyncio.Queue[list[Delta] | Exception | None],
) -> None:
    try:
        async with aclosing(stream):
            async for deltas in stream:
                await arrivals.put(deltas)
    except Exception as error:  # noqa: BLE001 - raised again by whoever reads the arrivals
        await arrivals.put(error)
    else:
        await arrivals.put(None)


async def _run(
    spec: SequenceSpec, *, client: EngineClient, metrics: ServingMetrics
) -> AsyncGenerator[list[Delta], None]:
    detokenizer = Detokenizer(
        spec.model.text.tokenizer,
        stop=spec.text.stop,
        skip_special_tokens=spec.text.skip_special_tokens,
        include_stop=spec.text.include_stop,
    )
    ended = "abort"
    meter = metrics.follow(
        spec.model.name, num_prompt=len(spec.prompt_ids), arrived_s=spec.arrived_at
    )
    batches = client.submit(
        spec.request_id,
        spec.model.engine_name,
        spec.prompt_ids,
        spec.sampling,
        priority=spec.priority,
        cache_salt=spec.cache_salt,
        tenant=spec.tenant,
        start_within_s=spec.start_within_s,
    )
    try:
        async with aclosing(batches):
            async for tokens, arrivals_s in batches:
                deltas = _deltas(spec, detokenizer, tokens)
                if spec.prompt_only:
                    meter.began(arrivals_s[0], tokens[0].queued_s)
                else:
                    meter.came(arrivals_s[: len(deltas)], tokens[0].queued_s)
                reason = deltas[-1].finish_reason
                if reason is not None:
                    ended = reason.value
                yield deltas
                if reason is not None:
                    return  # a stop string: closing the tokens aborts the sequence
    except Exception as error:
        ended = "error"
        if isinstance(error, InvalidRequestError) and error.param == STRUCTURED_OUTPUTS:
            error.param = _asker(spec, error)
        raise
    finally:
        meter.ended(ended)


def _asker(spec: SequenceSpec, error: InvalidRequestError) -> str | None:
    """Returns the field that asked for what the engine refuses of a grammar."""
    is_answers = f" at {ANSWER_LINE}(" in error.message  # llguidance says it so
    return spec.answer_param if is_answers and spec.answer_param else spec.grammar_param


def _deltas(
    spec: SequenceSpec, detokenizer: Detokenizer, tokens: Sequence[TokenOutput]
) -> list[Delta]:
    """Returns what tokens add, one after another, up to the end of the sequence."""
    deltas: list[Delta] = []
    for token in tokens:
        deltas.append(_delta(spec, detokenizer, token))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def _delta(spec: SequenceSpec, detokenizer: Detokenizer, token: TokenOutput) -> Delta:
    """Returns what a token adds."""
    if spec.prompt_only:
        ended = FinishReason.LENGTH
        return Delta(index=spec.index, token=token, text="", finish_reason=ended, is_answer=False)
    text, finish_reason = _advance(detokenizer, token, spec.text)
    return Delta(index=spec.index, token=token, text=text, finish_reason=finish_reason)


def _advance(
    detokenizer: Detokenizer, token: TokenOutput, options: TextOptions
) -> tuple[str, FinishReason | None]:
    """Returns the text a token adds and how the sequence ended with it, if it did."""
    is_stop_token = token.finish_reason is FinishReason.STOP
    text = "" if is_stop_token and not options.include_stop else detokenizer.push(token.token_id)
    if detokenizer.stopped:
        return text, FinishReason.STOP
    if token.finish_reason is not None:
        text += detokenizer.finish()
        if detokenizer.stopped:
            return text, FinishReason.STOP
    return text, token.finish_reason
