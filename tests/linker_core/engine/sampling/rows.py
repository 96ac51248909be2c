"""Rows to sample: sequences without an engine."""

from __future__ import annotations

from typing import Any

from linker_core.engine.messages import SamplingParams
from linker_core.engine.sequence import SequenceState


def sequence(
    *,
    prompt: tuple[int, ...] = (0,),
    output: tuple[int, ...] = (),
    vocab_size: int = 4,
    max_tokens: int = 100,
    temperature: float = 1.0,
    **params: Any,
) -> SequenceState:
    return SequenceState(
        request_id="r",
        model="m",
        slot=0,
        vocab_size=vocab_size,
        tokens=[*prompt, *output],
        num_prompt=len(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=temperature, **params),
        arrival=0,
    )
