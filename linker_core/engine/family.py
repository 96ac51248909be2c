"""One family at work: schedule, run, postprocess.

Owns the family's runner, pages and sequences. Knows nothing of loading or of messages in.

Legend: R rows of logits, N those of one chunk, A those that ask for a token, V columns.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from linker_core.config import EngineConfig
from linker_core.engine.devices import arithmetic_for
from linker_core.engine.grammar import Matcher
from linker_core.engine.kv_cache import KVCache, KVShape
from linker_core.engine.messages import FinishReason, RequestFailed, TokenOutput
from linker_core.engine.prompt_logprobs import PromptLogprobs
from linker_core.engine.runner import Runner
from linker_core.engine.sampling.choose import Sampled, not_finite
from linker_core.engine.sampling.sampler import Sampler
from linker_core.engine.schedule import Scheduled
from linker_core.engine.scheduler import Scheduler
from linker_core.engine.sequence import SequenceState
from linker_core.engine.step import Computed, StepRun, compute, still_works
from linker_core.errors import EngineFailureError, LinkerError
from linker_core.weights.architecture import ModelConfig

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(slots=True)
class FamilyOutput:
    """What one step of a family gave."""

    tokens: list[TokenOutput] = field(default_factory=list)
    failed: list[RequestFailed] = field(default_factory=list)
    ended: list[SequenceState] = field(default_factory=list)  # finished or failed
    crashed: bool = False  # nothing of the step could be computed, nor anything else


def kv_shape(model: ModelConfig, config: EngineConfig, *, dtype: torch.dtype) -> KVShape:
    """Returns the shape of the cache that a family of `model` gets: whole pages, at least one."""
    return KVShape(
        num_pages=max(1, config.kv_cache_tokens // config.page_tokens),
        page_tokens=config.page_tokens,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=dtype,
    )


class Family:
    """The models that one skeleton serves.

    Args:
        name: The donor's name.
        model: The donor's shape.
        shape: Of the KV cache; its dtype is the dtype of the activations.
        config: The engine's settings.
        device: Where everything lies.
        clock: Monotonic seconds.

    Attributes:
        batch_variants: Steps by how many distinct models they computed for.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        shape: KVShape,
        *,
        config: EngineConfig,
        device: torch.device,
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.model = model
        self.cache = KVCache(shape, device=device)
        arithmetic = arithmetic_for(device, precision=config.matmul_precision)
        self.runner = Runner(model, self.cache, arithmetic, device=device)
        self.scheduler = Scheduler(
            self.cache,
            max_batch_tokens=config.max_batch_tokens,
            max_num_seqs=config.max_num_seqs,
        )
        self.batch_variants: Counter[int] = Counter()
        self._clock = clock
        self._sampler = Sampler()
        self._prompt_logprobs: dict[SequenceState, PromptLogprobs] = {}

    def add(self, sequence: SequenceState, matcher: Matcher | None = None) -> None:
        """Queues a new sequence; its answer follows the matcher, if there is one."""
        if matcher is not None:
            self._sampler.constrain(sequence, matcher)
        if sequence.sampling.prompt_logprobs is not None:
            self._prompt_logprobs[sequence] = PromptLogprobs(sequence)
        self.scheduler.add(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forgets a finished, failed or aborted sequence and frees its pages."""
        self.scheduler.remove(sequence)
        self._forget(sequence)

    def step(self) -> FamilyOutput:
        """Computes one batch: schedule, run, postprocess."""
        output = FamilyOutput()
        plan = self.scheduler.schedule()
        for sequence, error in plan.failed:
            self._forget(sequence)
            _record_failure(sequence, error, output)
        if plan.chunks:
            self._note_first_steps(plan.chunks)
            run = compute(self.runner, plan.chunks)
            for chunk in run.failed:
                self._fail(chunk.sequence, _not_computed(), output)
            output.crashed = not run.computed and not still_works(self.runner)
            self._count(run)
            for part in run.computed:
                self._postprocess(part, output)
        return output

    def _note_first_steps(self, chunks: Sequence[Scheduled]) -> None:
        """Notes how long those waited that no step has computed before."""
        now_s = self._clock()
        for chunk in chunks:
            if chunk.sequence.queued_s is None:
                chunk.sequence.queued_s = now_s - chunk.sequence.submitted_s

    def _count(self, run: StepRun) -> None:
        """Counts a step that has computed something."""
        if run.computed:
            slots = {chunk.sequence.slot for part in run.computed for chunk in part.chunks}
            self.batch_variants[len(slots)] += 1

    def _postprocess(self, part: Computed, output: FamilyOutput) -> None:
        """Moves the sequences of a part on, and gives those a token that want one."""
        asking, rows_A = self._advance(part, output)
        if not asking:
            return
        logits_AV = part.logits
        if len(rows_A) < len(logits_AV):
            logits_AV = logits_AV[rows_A]
        results = self._sampler.sample(logits_AV, asking)
        for sequence, result in zip(asking, results, strict=True):
            if isinstance(result, LinkerError):
                self._fail(sequence, result, output)
            else:
                self.scheduler.commit(sequence)
                self._take(sequence, result, output)

    def _advance(
        self, part: Computed, output: FamilyOutput
    ) -> tuple[list[SequenceState], list[int]]:
        """Returns the sequences that want a token, and the row of the logits of each."""
        asking: list[SequenceState] = []
        rows: list[int] = []
        end = 0
        for chunk, finite in zip(part.chunks, part.finite, strict=True):
            sequence, first = chunk.sequence, end
            end += chunk.num_logits
            if not finite:
                self._fail(sequence, not_finite(sequence.model), output)
                continue
            if sequence.wants_prompt_rows:
                take = self._prompt_logprobs[sequence].take
                rows_NV = part.logits[first:end]
                error = _guarded(sequence, partial(take, sequence.num_computed, rows_NV))
                if isinstance(error, LinkerError):
                    self._fail(sequence, error, output)
                    continue
            if wants_token := chunk.wants_token:
                asking.append(sequence)
                rows.append(end - 1)
            self.scheduler.advance(chunk)
            if not wants_token:
                self.scheduler.commit(sequence)
        return asking, rows

    def _take(self, sequence: SequenceState, sampled: Sampled, output: FamilyOutput) -> None:
        is_first = sequence.num_output == 0
        gathered = self._prompt_logprobs.pop(sequence, None)
        prompt = None if gathered is None else _guarded(sequence, gathered.records)
        if isinstance(prompt, LinkerError):
            self._fail(sequence, prompt, output)
            return
        reason = sequence.append(sampled.token_id)
        if sampled.ends_answer:
            reason = FinishReason.STOP
        if reason is not None:
            self.remove(sequence)
            output.ended.append(sequence)
        output.tokens.append(
            TokenOutput(
                request_id=sequence.request_id,
                token_id=sampled.token_id,
                finish_reason=reason,
                logprob=sampled.logprob,
                top_logprobs=sampled.top_logprobs,
                prompt_logprobs=prompt,
                num_cached_tokens=sequence.num_cached if is_first else None,
                queued_s=sequence.queued_s if is_first else None,
            )
        )

    def _fail(self, sequence: SequenceState, error: LinkerError, output: FamilyOutput) -> None:
        self.remove(sequence)
        _record_failure(sequence, error, output)

    def _forget(self, sequence: SequenceState) -> None:
        self._sampler.forget(sequence)
        self._prompt_logprobs.pop(sequence, None)


def _guarded(sequence: SequenceState, work: Callable[[], _Result]) -> _Result | LinkerError:
    """Does what is about the prompt's log-probabilities; a fault is returned as an error."""
    try:
        return work()
    except LinkerError as error:
        return error
    except Exception:  # noqa: BLE001 - one request must not end the others of its batch
        _log.exception("prompt log-probabilities failed for request %s", sequence.request_id)
        return _not_computed()


def _record_failure(sequence: SequenceState, error: LinkerError, output: FamilyOutput) -> None:
    output.ended.append(sequence)
    output.failed.append(RequestFailed(request_id=sequence.request_id, error=error.to_record()))


def _not_computed() -> EngineFailureError:
    return EngineFailureError(
        "The engine failed while computing this request. Send it again, and tell the operator "
        "if it fails again."
    )
