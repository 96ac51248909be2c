"""What a calibration setting names, as one variant reads it within its context. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from linker_core.tuning.calibration import (
    MAX_PROMPT_TOKENS,
    MAX_SEQUENCE_TOKENS,
    CalibrationPrompt,
    CalibrationText,
    encode,
    prompts_only,
)
from linker_core.tuning.dialogues import load_dialogues
from linker_core.tuning.memory import ANSWER_TOKENS
from linker_core.tuning.reading import VariantReader


def written_text(
    calibration: str | None, reader: VariantReader, *, context: int
) -> CalibrationText:
    """Returns the shipped dialogues, after those of a user's file if one is named.

    Args:
        calibration: None, or a file of JSON lines.
        reader: The variant's text side.
        context: Positions the variant knows.

    Raises:
        InvalidRequestError: The file is of no use, or nothing can be read by this variant.
    """
    dialogues = load_dialogues(None if calibration is None else Path(calibration))
    return encode(dialogues, reader, max_sequence_tokens=min(MAX_SEQUENCE_TOKENS, context))


def prompts_to_answer(reader: VariantReader, *, context: int) -> list[CalibrationPrompt]:
    """Returns the shipped prompts that leave room for an answer.

    Args:
        reader: The variant's text side.
        context: Positions the variant knows.

    Raises:
        InvalidRequestError: None can be read by this variant.
    """
    longest = min(MAX_PROMPT_TOKENS, max(1, context - ANSWER_TOKENS))
    return prompts_only(load_dialogues(None), reader, max_prompt_tokens=longest)
