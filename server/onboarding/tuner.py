"""The tuner as a disposable process beside the engine, with memory set aside for it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from linker_core.errors import EngineFailureError, InsufficientCapacityError, NotReadyError
from linker_core.text.template_process import template_process
from linker_core.tuning.calibration import MAX_PROMPT_TOKENS
from linker_core.tuning.memory import (
    ANSWER_TOKENS,
    MAX_PLANS_AT_ONCE,
    answering_bytes,
    tuning_bytes,
)
from linker_core.tuning.reading import VariantReader
from linker_core.tuning.request import SELF_CALIBRATION, Device, TuneRequest
from linker_core.tuning.result import TuneResult
from linker_core.tuning.sources import prompts_to_answer, written_text
from linker_core.weights.checkpoint import Identity
from server.bridge.client import EngineClient
from server.onboarding.processes import OnStageProgress, run_worker
from server.residency.catalog import TextSide
from server.residency.room import Room

logger = logging.getLogger(__name__)

TUNE_COMMAND = (sys.executable, "-P", "-m", "linker_core.tuning.worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What the tuner found, and of which files."""

    result: TuneResult
    identity: Identity
    donor_identity: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """The calibration text as a variant reads it, and what tuning on it takes."""

    source_digest: str  # of all that decides the text: token ids, or prompts and stop tokens
    digest: str | None  # `CalibrationText.digest`; None: the variant has yet to answer
    nbytes: int  # the most that a tuner takes of its device


class _Place(NamedTuple):
    device: Device
    lender: EngineClient | None  # whose end ends the tuner: the next engine takes the whole device


class Tuner:
    """Starts tuning workers; `device` is the engine's.

    Args:
        engine: Waits for an engine that holds the models; its memory is what a tuner shares.
        room: Makes room for the tuner beside what is resident.
        device: The engine's.
        busy: Whether sequences run now.
        command: The worker's command line.
    """

    def __init__(
        self,
        *,
        engine: Callable[[], Awaitable[EngineClient]],
        room: Room,
        device: Device,
        busy: Callable[[], bool],
        command: Sequence[str] = TUNE_COMMAND,
    ) -> None:
        self.device: Device = device
        self._engine = engine
        self._room = room
        self._busy = busy
        self._command = command
        self._numbers = itertools.count()

    async def run(
        self, request: TuneRequest, *, nbytes: int, on_progress: OnStageProgress
    ) -> Tuned:
        """Runs one worker on the device that has room. Cancelling the wait kills the worker.

        A CUDA engine that ends takes the worker's memory with it: it starts over with the next one.

        Args:
            request: What to find; its device is chosen here.
            nbytes: The most that the worker takes of its device.
            on_progress: Hears of each progress line.

        Raises:
            InsufficientCapacityError: There is no room for it.
            LinkerError: What the worker says, or that it died.
        """
        result = None
        while result is None:
            async with self._reserved(nbytes) as place:
                worker = run_worker(
                    self._command,
                    request=replace(request, device=place.device).to_json(),
                    busy=self._busy,
                    on_progress=on_progress,
                )
                result = await _unless_gone(worker, place.lender)
        return Tuned(
            result=TuneResult.from_json(result["tune"]),
            identity=tuple(tuple(entry) for entry in result["identity"]),
            donor_identity=tuple(tuple(entry) for entry in result["donor_identity"]),
        )

    @asynccontextmanager
    async def _reserved(self, nbytes: int) -> AsyncIterator[_Place]:
        """Yields where to tune, its memory set aside as long as that engine lives."""
        name, what = f"tuner-{next(self._numbers)}", "Measuring what sharing costs"
        async with AsyncExitStack() as stack:
            while True:
                client = await self._engine()
                try:
                    await stack.enter_async_context(
                        self._room.reserving(client, name, nbytes, what=what)
                    )
                    break
                except InsufficientCapacityError as error:
                    if self.device == "cpu":
                        raise InsufficientCapacityError(
                            f"{error.message} Policies exact and thresholds need no measuring.",
                            retry_after_s=error.retry_after_s,
                        ) from error
                    logger.info("no room for a tuner on %s; it runs on the CPU", self.device)
                    yield _Place("cpu", None)  # host memory is not the engine's to give
                    return
                except (EngineFailureError, NotReadyError):
                    if not client.closed.is_set():
                        raise
            yield _Place(self.device, None if self.device == "cpu" else client)


async def _unless_gone(
    worker: Coroutine[Any, Any, Mapping[str, Any]], lender: EngineClient | None
) -> Mapping[str, Any] | None:
    """Returns a worker's result; None, and the worker is ended, if its lender goes before."""
    if lender is None:
        return await worker
    work = asyncio.ensure_future(worker)
    gone = asyncio.ensure_future(lender.closed.wait())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        logger.info("the engine ended, and with it the tuner's share of the device; tuning anew")
        return None
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.gather(gone, work, return_exceptions=True)


def encode_text(
    donor: TextSide, variant: TextSide, calibration: str | None, *, device: Device
) -> EncodedText:
    """Encodes the calibration text as `calibration_text` does, without torch. Blocking.

    Raises:
        InvalidRequestError: The calibration text cannot be used with this variant.
    """
    with template_process(variant.template) as template:
        reader = VariantReader(
            tokenizer=variant.tokenizer,
            template=template,
            eos_token_ids=variant.eos_token_ids,
            vocab_size=variant.config.vocab_size,
        )
        return _encode(donor, variant, calibration, reader, device=device)


def _encode(
    donor: TextSide,
    variant: TextSide,
    calibration: str | None,
    reader: VariantReader,
    *,
    device: Device,
) -> EncodedText:
    context = variant.config.max_position_embeddings
    if calibration != SELF_CALIBRATION:
        text = written_text(calibration, reader, context=context)
        num_tokens = sum(len(sequence.token_ids) for sequence in text.sequences)
        return EncodedText(
            source_digest=text.digest,
            digest=text.digest,
            nbytes=_pass_bytes(donor, variant, num_tokens, device),
        )
    prompts = prompts_to_answer(reader, context=context)
    num_tokens = sum(len(prompt.token_ids) + ANSWER_TOKENS for prompt in prompts)
    asked = [
        SELF_CALIBRATION,
        sorted(variant.eos_token_ids),  # they end the answers
        [[prompt.kind, prompt.token_ids] for prompt in prompts],
    ]
    return EncodedText(
        source_digest=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        digest=None,
        nbytes=max(
            _pass_bytes(donor, variant, num_tokens, device),
            answering_bytes(variant.config, max_prompt_tokens=MAX_PROMPT_TOKENS, device=device),
        ),
    )


def _pass_bytes(donor: TextSide, variant: TextSide, num_tokens: int, device: Device) -> int:
    return tuning_bytes(
        donor.config,
        variant.config,
        num_tokens=num_tokens,
        num_plans=MAX_PLANS_AT_ONCE,
        device=device,
    )
