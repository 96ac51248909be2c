"""Everything about a checkpoint that can be checked at once, before a job is accepted.

Blocking: callers run these in a thread.
"""

from __future__ import annotations

from pathlib import Path

from linker_core.errors import InsufficientCapacityError
from linker_core.text.chat_template import ChatTemplate
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.checkpoint import Checkpoint
from server.onboarding.catalog import TextSide


def read_text_side(path: Path) -> TextSide:
    """Validates headers, config, tokenizer and template of a checkpoint.

    Raises:
        BadCheckpointError: Damaged or dishonest files.
        UnsupportedFormatError: Not safetensors, or an architecture outside the allow-list.
    """
    with Checkpoint.open(path) as checkpoint:
        return TextSide(
            path=path,
            identity=checkpoint.identity,
            config=checkpoint.config,
            tokenizer=Tokenizer.load(path),
            template=ChatTemplate.load(path),
            eos_token_ids=checkpoint.eos_token_ids,
            generation=dict(checkpoint.generation),
            checkpoint_bytes=checkpoint.nbytes,
        )


def check_capacity(needed_bytes: int, free_bytes: int) -> None:
    """Refuses what cannot fit.

    Raises:
        InsufficientCapacityError: With what it needs and what there is.
    """
    if needed_bytes > free_bytes:
        raise InsufficientCapacityError(
            f"The model needs {needed_bytes} bytes of device memory and {free_bytes} are free. "
            "Unload a model, raise the memory budget, or onboard it as a variant of a donor."
        )
