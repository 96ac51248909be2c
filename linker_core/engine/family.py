"""One family at work: schedule, run, postprocess.

Owns the family's runner, pages and sequences. Knows nothing of loading or of messages in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from linker_core.config import EngineConfig
from linker_core.engine.attention import ATTENTION_NAME
from linker_core.engine.kv_cache import KVCache, KVShape
from linker_core.engine.messages import RequestFailed, TokenOutput
from linker_core.engine.runner import Chunk, Runner
from linker_core.engine.sampling import Sampled, sample
from linker_core.engine.scheduler import Scheduled, Scheduler
from linker_core.engine.sequence import SequenceState
from linker_core.errors import EngineFailureError, LinkerError
from linker_core.residency.skeleton import build_skeleton
from linker_core.weights.architecture import ModelConfig

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class FamilyOutput:
    """What one step of a family gave."""

    tokens: list[TokenOutput] = field(default_factory=list)
    failed: list[RequestFailed] = field(default_factory=list)
    ended: list[SequenceState] = field(default_factory=list)  # finished or failed
    crashed: bool = False  # the forward pass itself failed


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
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        shape: KVShape,
        *,
        config: EngineConfig,
        device: torch.device,
    ) -> None:
        self.name = name
        self.model = model
        self.cache = KVCache(shape, device=device)
        skeleton = build_skeleton(
            model, device=device, dtype=shape.dtype, attn_implementation=ATTENTION_NAME
        )
        self.runner = Runner(skeleton, self.cache, device=device)
        self.scheduler = Scheduler(
            self.cache,
            max_batch_tokens=config.max_batch_tokens,
            max_num_seqs=config.max_num_seqs,
        )

    def step(self) -> FamilyOutput:
        """Computes one batch: schedule, run, postprocess."""
        output = FamilyOutput()
        plan = self.scheduler.schedule()
        for sequence, error in plan.failed:
            self._record_failure(sequence, error, output)
        if plan.chunks:
            asking = [chunk.sequence for chunk in plan.chunks if chunk.wants_token]
            results = self._run(plan.chunks, asking, output)
            if results is not None:
                self._postprocess(plan.chunks, zip(asking, results, strict=True), output)
        return output

    def _run(
        self, chunks: list[Scheduled], asking: list[SequenceState], output: FamilyOutput
    ) -> list[Sampled | LinkerError] | None:
        """Computes the chunks and chooses a token for each sequence that asks for one."""
        try:
            logits_RV = self.runner.forward([_as_chunk(chunk) for chunk in chunks])
            return sample(logits_RV, asking) if asking else []
        except Exception:  # noqa: BLE001 - no row can be blamed; the engine itself goes on
            _log.exception("a step of family %s failed", self.name)
            error = EngineFailureError(
                "The engine failed while computing this request's batch. Send the request again."
            )
            for chunk in chunks:
                self._fail(chunk.sequence, error, output)
            output.crashed = True
            return None

    def _postprocess(
        self,
        chunks: list[Scheduled],
        results: Iterable[tuple[SequenceState, Sampled | LinkerError]],
        output: FamilyOutput,
    ) -> None:
        for chunk in chunks:
            self.scheduler.advance(chunk)
        for sequence, result in results:
            if isinstance(result, LinkerError):
                self._fail(sequence, result, output)
            else:
                self._take(sequence, result, output)

    def _take(self, sequence: SequenceState, sampled: Sampled, output: FamilyOutput) -> None:
        reason = sequence.append(sampled.token_id)
        if reason is not None:
            self.scheduler.remove(sequence)
            output.ended.append(sequence)
        output.tokens.append(
            TokenOutput(
                request_id=sequence.request_id,
                token_id=sampled.token_id,
                finish_reason=reason,
                logprob=sampled.logprob,
                top_logprobs=sampled.top_logprobs,
            )
        )

    def _fail(self, sequence: SequenceState, error: LinkerError, output: FamilyOutput) -> None:
        self.scheduler.remove(sequence)
        self._record_failure(sequence, error, output)

    def _record_failure(
        self, sequence: SequenceState, error: LinkerError, output: FamilyOutput
    ) -> None:
        output.ended.append(sequence)
        output.failed.append(RequestFailed(request_id=sequence.request_id, error=error.to_record()))


def _as_chunk(scheduled: Scheduled) -> Chunk:
    sequence, num_tokens = scheduled
    start = sequence.num_computed
    return Chunk(
        slot=sequence.slot,
        token_ids=sequence.tokens[start : start + num_tokens],
        start=start,
        table=sequence.table,
        wants_token=scheduled.wants_token,
    )
