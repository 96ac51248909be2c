"""A family's pairs, and text that no model was trained on and no plan may be tuned on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from linker_core.sharing.scan import scan
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.calibration import CalibrationText, encode
from linker_core.tuning.dialogues import load_dialogues
from linker_core.tuning.reading import VariantReader
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.tuning.pairs import Pair
from tests.templates import compiled_in


@contextmanager
def opened(family: Path, variant: str) -> Iterator[Pair]:
    """Opens a variant beside its family's `base`."""
    with ExitStack() as stack:
        donor, own = (
            stack.enter_context(Checkpoint.open(family / name)) for name in ("base", variant)
        )
        yield Pair(donor=donor, variant=own, report=scan(donor, own))


def held_out_text(variant: Checkpoint) -> CalibrationText:
    """Returns what a family's folder keeps in `heldout` for a variant, as the variant reads it."""
    path = variant.path
    reader = VariantReader(
        tokenizer=Tokenizer.load(path),
        template=compiled_in(path),
        eos_token_ids=variant.eos_token_ids,
        vocab_size=variant.config.vocab_size,
    )
    dialogues = load_dialogues(path.parent / "heldout" / f"{path.name}.jsonl")
    return encode([dialogue for dialogue in dialogues if dialogue.given], reader)
