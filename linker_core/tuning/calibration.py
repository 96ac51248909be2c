"""The token sequences that plans of one variant are priced on. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Final

from linker_core.errors import InvalidRequestError
from linker_core.tuning.dialogues import Dialogue
from linker_core.tuning.reading import VariantReader

MAX_SEQUENCE_TOKENS: Final = 512
MAX_RESPONSE_TOKENS: Final = 4_600
MIN_RESPONSE_TOKENS: Final = 4_000  # a budget is not held against fewer
MAX_PROMPT_TOKENS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSequence:
    """One dialogue as the variant reads it."""

    token_ids: tuple[int, ...]
    responses: tuple[range, ...]  # positions p >= 1 the assistant wrote; logits at p - 1 predict p
    kind: str  # `Dialogue.kind`
    text_digest: str  # `Dialogue.digest`


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """What plans of one variant are priced on."""

    sequences: tuple[CalibrationSequence, ...]
    digest: str  # SHA-256 over kinds, token ids and spans: says on what a stored price was measured
    num_response_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPrompt:
    """A dialogue up to its last answer, for the variant to answer itself."""

    token_ids: tuple[int, ...]
    kind: str  # `Dialogue.kind`
    text_digest: str  # `Dialogue.digest`


def encode(
    dialogues: Sequence[Dialogue],
    reader: VariantReader,
    *,
    max_sequence_tokens: int = MAX_SEQUENCE_TOKENS,
    max_response_tokens: int = MAX_RESPONSE_TOKENS,
) -> CalibrationText:
    """Returns the dialogues teacher-forced in the variant's own format.

    Kinds get equal shares of the response tokens as far as they last; within a kind dialogues come
    in the order of their digests. Those of a user's file come first and take half of the tokens, or
    all of theirs if they are fewer. A dialogue that the variant cannot read is left out.

    Args:
        dialogues: Of `load_dialogues`.
        reader: The variant's text side.
        max_sequence_tokens: Longer sequences are cut.
        max_response_tokens: No further sequence is added once there are as many.

    Raises:
        InvalidRequestError: None of the user's dialogues, or none at all, can be used.
    """
    given = [dialogue for dialogue in dialogues if dialogue.given]
    shipped = [dialogue for dialogue in dialogues if not dialogue.given]
    sequences: list[CalibrationSequence] = []
    if given:
        half = max_response_tokens // 2 if shipped else max_response_tokens
        sequences += _encode_up_to(half, given, reader, max_sequence_tokens)
    left = max_response_tokens - _count(sequences)
    if shipped and left > 0:
        sequences += _encode_up_to(left, shipped, reader, max_sequence_tokens)
    return _assembled(sequences)


def prompts_only(
    dialogues: Sequence[Dialogue],
    reader: VariantReader,
    *,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
) -> list[CalibrationPrompt]:
    """Returns each dialogue's prompt up to its last answer, a user's and shipped ones in turns.

    Plain texts, longer prompts and what the variant cannot read are left out.

    Raises:
        InvalidRequestError: Nothing is left.
    """
    sides: list[list[CalibrationPrompt]] = [[], []]
    reason = "they are plain texts"
    for dialogue in _mixed(dialogue for dialogue in dialogues if not dialogue.plain):
        try:
            ids = reader.prompt(dialogue)
        except InvalidRequestError as error:
            reason = error.message
            continue
        if not 0 < len(ids) <= max_prompt_tokens:
            reason = f"a prompt has {len(ids)} tokens, expected 1 to {max_prompt_tokens}"
            continue
        prompt = CalibrationPrompt(
            token_ids=tuple(ids), kind=dialogue.kind, text_digest=dialogue.digest
        )
        sides[dialogue.given].append(prompt)
    shipped, given = sides
    prompts = [one for one in chain(*zip_longest(given, shipped)) if one is not None]
    if not prompts:
        raise _nothing_left(reason)
    return prompts


def with_answers(
    prompts: Sequence[CalibrationPrompt], answers: Sequence[Sequence[int]]
) -> CalibrationText:
    """Returns the prompts followed by the variant's own answers; empty answers are left out.

    Args:
        prompts: Of `prompts_only`.
        answers: Token ids generated for each, the stop token included.
    """
    return _assembled(
        [
            CalibrationSequence(
                token_ids=(*prompt.token_ids, *answer),
                responses=(range(len(prompt.token_ids), len(prompt.token_ids) + len(answer)),),
                kind=prompt.kind,
                text_digest=prompt.text_digest,
            )
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer
        ]
    )


def _encode_up_to(
    max_response_tokens: int,
    dialogues: Sequence[Dialogue],
    reader: VariantReader,
    max_sequence_tokens: int,
) -> list[CalibrationSequence]:
    sequences: list[CalibrationSequence] = []
    reason = ""
    waiting: dict[str, deque[Dialogue]] = {}
    for dialogue in _mixed(dialogues):
        waiting.setdefault(dialogue.kind, deque()).append(dialogue)
    num_tokens = dict.fromkeys(sorted(waiting), 0)
    while num_tokens and _count(sequences) < max_response_tokens:
        kind = min(num_tokens, key=num_tokens.__getitem__)  # the one that has had least
        if not waiting[kind]:
            del num_tokens[kind]
            continue
        dialogue = waiting[kind].popleft()
        try:
            ids, spans = reader.read(dialogue, max_tokens=max_sequence_tokens)
        except InvalidRequestError as error:
            reason = error.message
            continue
        num_tokens[kind] += sum(map(len, spans))
        sequences.append(
            CalibrationSequence(
                token_ids=tuple(ids),
                responses=tuple(spans),
                kind=kind,
                text_digest=dialogue.digest,
            )
        )
    if not sequences:
        raise _nothing_left(reason)
    return sequences


def _mixed(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    """Returns the dialogues in an order that is arbitrary, but the same for every variant."""
    return sorted(dialogues, key=lambda dialogue: dialogue.digest)


def _count(sequences: Iterable[CalibrationSequence]) -> int:
    return sum(len(span) for sequence in sequences for span in sequence.responses)


def _assembled(sequences: Sequence[CalibrationSequence]) -> CalibrationText:
    record = [
        [
            sequence.kind,
            sequence.token_ids,
            [[span.start, span.stop] for span in sequence.responses],
        ]
        for sequence in sequences
    ]
    return CalibrationText(
        sequences=tuple(sequences),
        digest=hashlib.sha256(json.dumps(record).encode()).hexdigest(),
        num_response_tokens=_count(sequences),
    )


def _nothing_left(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Calibration: none of the dialogues can be used with this model: {reason:.300}.",
        param="calibration",
    )
