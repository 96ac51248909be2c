"""A model's first token, which nobody gets: what cannot answer is found before it is asked."""

from __future__ import annotations

import logging

from linker_core.engine.family import Family
from linker_core.engine.messages import SamplingParams
from linker_core.engine.runner import Chunk, StepResult
from linker_core.engine.sampling.sampler import Sampler
from linker_core.engine.sequence import SequenceState
from linker_core.errors import LinkerError, NumericalError, UnusableModelError
from linker_core.residency.device import is_lack_of_memory
from linker_core.weights.architecture import ModelConfig

_log = logging.getLogger(__name__)


def has_room(family: Family) -> bool:
    """Whether a page is free; else one is as soon as any sequence of the family ends."""
    return family.cache.num_free_pages > 0


def generate_first_token(family: Family, slot: int, config: ModelConfig, *, name: str) -> None:
    """Generates one token greedily, in one pass, on a page that is given back.

    No other sequence can find that page, and no gauge or counter knows of it.

    Args:
        family: Has room.
        slot: The model's, bound.
        config: The model's.
        name: How errors call it.

    Raises:
        UnusableModelError: Its numbers are not finite, or the pass fails.
        MemoryError, RuntimeError: The device has no memory for the pass.
    """
    sequence = _sequence(slot, config, name)
    grown = family.cache.grow(sequence.table, 1)
    assert grown, "there is room"
    try:
        result = _forward(family, sequence)
    finally:
        family.cache.release(sequence.table)
    token = Sampler().sample(result.logits_RV, [sequence])[0]
    if isinstance(token, NumericalError) or not all(result.finite):
        raise UnusableModelError(
            f"Model '{name}' gave numbers that are not finite for its first token, so it is not "
            "served. Check the checkpoint's weights, or give it another policy."
        )
    if isinstance(token, LinkerError):
        raise _failed(name)


def _sequence(slot: int, config: ModelConfig, name: str) -> SequenceState:
    bos = config.bos_token_id
    return SequenceState(
        request_id=f"{name} (first token)",
        model=name,
        slot=slot,
        vocab_size=config.vocab_size,
        tokens=[bos if bos is not None and bos < config.vocab_size else 0],
        num_prompt=1,
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
        arrival=0,
    )


def _forward(family: Family, sequence: SequenceState) -> StepResult:
    chunk = Chunk(
        slot=sequence.slot, token_ids=sequence.tokens, start=0, table=sequence.table, num_logits=1
    )
    try:
        return family.runner.forward([chunk])
    except Exception as error:
        if isinstance(error, MemoryError | RuntimeError) and is_lack_of_memory(error):
            raise
        _log.exception("the first token of model %r cannot be computed", sequence.model)
        raise _failed(sequence.model) from error


def _failed(name: str) -> UnusableModelError:
    return UnusableModelError(
        f"The engine failed while computing the first token of model '{name}', so it is not "
        "served. See the server's log."
    )
