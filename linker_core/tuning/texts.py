"""Chooses and encodes the text that a variant's plans are priced on."""

from __future__ import annotations

from pathlib import Path

from linker_core.text.chat_template import ChatTemplate
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.calibration import CalibrationText, encode
from linker_core.tuning.dialogues import load_dialogues
from linker_core.tuning.reading import VariantReader
from linker_core.tuning.request import SELF_CALIBRATION
from linker_core.weights.checkpoint import Checkpoint


def calibration_text(variant: Checkpoint, calibration: str | None) -> CalibrationText:
    """Returns the text that a variant's plans are priced on.

    Args:
        variant: Whose tokenizer and chat template are used.
        calibration: None for the shipped dialogues, or a file of JSON lines to add to them.

    Raises:
        BadCheckpointError: The tokenizer or the template is damaged.
        InvalidRequestError: The file is of no use.
    """
    assert calibration != SELF_CALIBRATION
    reader = VariantReader(
        tokenizer=Tokenizer.load(variant.path),
        template=ChatTemplate.load(variant.path),
        eos_token_ids=variant.eos_token_ids,
        vocab_size=variant.config.vocab_size,
    )
    return encode(load_dialogues(None if calibration is None else Path(calibration)), reader)
