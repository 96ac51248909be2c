"""Chooses and encodes the text that a variant's plans are priced on."""

from __future__ import annotations

from linker_core.config import MatmulPrecision
from linker_core.pace import Pace
from linker_core.text.template_process import template_process
from linker_core.text.template_source import TemplateSource
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.answers import own_answers
from linker_core.tuning.calibration import MAX_RESPONSE_TOKENS, CalibrationText, with_answers
from linker_core.tuning.reading import VariantReader
from linker_core.tuning.request import SELF_CALIBRATION, Device
from linker_core.tuning.sources import prompts_to_answer, written_text
from linker_core.weights.checkpoint import Checkpoint


def calibration_text(
    variant: Checkpoint,
    calibration: str | None,
    *,
    device: Device,
    pace: Pace,
    precision: MatmulPrecision,
) -> CalibrationText:
    """Returns the text that a variant's plans are priced on.

    Args:
        variant: Whose tokenizer and chat template are used.
        calibration: None for the shipped dialogues, a file of JSON lines to add to them, or "self"
            for the variant's own answers to the shipped prompts.
        device: Where the variant answers.
        pace: Slows its answering down while sequences run.
        precision: Of the products with which it answers.

    Raises:
        BadCheckpointError: The tokenizer or the template is damaged.
        InsufficientCapacityError: The whole variant does not fit, so it cannot answer.
        InvalidRequestError: The file is of no use.
    """
    tokenizer = Tokenizer.load(variant.path)
    context = variant.config.max_position_embeddings
    with template_process(TemplateSource.load(variant.path)) as template:
        reader = VariantReader(
            tokenizer=tokenizer,
            template=template,
            eos_token_ids=variant.eos_token_ids,
            vocab_size=variant.config.vocab_size,
        )
        if calibration != SELF_CALIBRATION:
            return written_text(calibration, reader, context=context)
        prompts = prompts_to_answer(reader, context=context)
    answers = own_answers(
        variant,
        prompts,
        enough_tokens=MAX_RESPONSE_TOKENS,
        device=device,
        pace=pace,
        precision=precision,
    )
    return with_answers(prompts[: len(answers)], answers)
