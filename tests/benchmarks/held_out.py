"""Text that no model of a family was trained on, and no plan may be tuned on."""

from __future__ import annotations

from linker_core.text.chat_template import ChatTemplate
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.calibration import CalibrationText, encode
from linker_core.tuning.dialogues import load_dialogues
from linker_core.tuning.reading import VariantReader
from linker_core.weights.checkpoint import Checkpoint


def held_out_text(variant: Checkpoint) -> CalibrationText:
    """Returns what a family's folder keeps in `heldout` for a variant, as the variant reads it."""
    path = variant.path
    reader = VariantReader(
        tokenizer=Tokenizer.load(path),
        template=ChatTemplate.load(path),
        eos_token_ids=variant.eos_token_ids,
        vocab_size=variant.config.vocab_size,
    )
    dialogues = load_dialogues(path.parent / "heldout" / f"{path.name}.jsonl")
    return encode([dialogue for dialogue in dialogues if dialogue.given], reader)
