"""Whether two models can run through one skeleton."""

from __future__ import annotations

from dataclasses import asdict

from linker_core.errors import BadCheckpointError
from linker_core.weights.architecture import ModelConfig


def check_same_family(donor: ModelConfig, variant: ModelConfig) -> None:
    """Refuses two models that cannot run through one skeleton.

    Vocabulary, context length, special tokens and tying belong to the variant and may differ.

    Raises:
        BadCheckpointError: Lists the fields that differ, with both values.
    """
    own = {
        "vocab_size", "max_position_embeddings", "eos_token_ids", "bos_token_id", "dtype",
        "tie_word_embeddings",
    }  # fmt: skip
    a, b = asdict(donor), asdict(variant)
    if differences := [
        f"{field}: donor {a[field]!r:.60}, variant {b[field]!r:.60}"
        for field in a
        if field not in own and a[field] != b[field]
    ]:
        raise BadCheckpointError(
            "The variant is no fine-tune of this donor: "
            + "; ".join(differences[:5])
            + ". Name another donor, or onboard it as a donor of its own."
        )
