"""A user's file of dialogues or texts, as a model reads them: what is learnt, or measured on."""

from __future__ import annotations

from pathlib import Path

from linker_core.errors import InvalidRequestError
from linker_core.text.template_process import template_process
from linker_core.text.template_source import TemplateSource
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.calibration import CalibrationSequence, encode
from linker_core.tuning.dialogues import load_dialogues
from linker_core.tuning.reading import VariantReader
from linker_core.weights.checkpoint import Checkpoint

_ALL_TOKENS = 1 << 40


def read_training_text(
    checkpoint: Checkpoint, path: Path, *, max_tokens: int, enough_tokens: int = _ALL_TOKENS
) -> tuple[CalibrationSequence, ...]:
    """Returns the rows of a JSON-lines file in the model's own chat format.

    A row is `{"messages": [{"role", "content"}, …]}`, of which the assistant's tokens are learnt,
    or `{"text": …}`, of which all but the first are. Rows come in the order of their digests.

    Args:
        checkpoint: Whose tokenizer and template.
        path: The file; untrusted.
        max_tokens: Longer sequences are cut; the model's context at most.
        enough_tokens: No further row is taken once there are as many learnt tokens.

    Raises:
        BadCheckpointError: The tokenizer or the template is damaged.
        InvalidRequestError: The file is of no use to this model.
    """
    tokenizer = Tokenizer.load(checkpoint.path)
    max_tokens = min(max_tokens, checkpoint.config.max_position_embeddings)
    try:
        dialogues = [each for each in load_dialogues(path) if each.given]
        with template_process(TemplateSource.load(checkpoint.path)) as template:
            reader = VariantReader(
                tokenizer=tokenizer,
                template=template,
                eos_token_ids=checkpoint.eos_token_ids,
                vocab_size=checkpoint.config.vocab_size,
            )
            text = encode(
                dialogues, reader, max_sequence_tokens=max_tokens, max_response_tokens=enough_tokens
            )
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{path.name}: {error.message}", param=error.param) from error
    return text.sequences
