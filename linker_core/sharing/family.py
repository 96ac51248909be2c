"""Whether two models can run through one skeleton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

from linker_core.errors import BadCheckpointError
from linker_core.weights.architecture import ModelConfig

# These belong to the variant.
_OWN: Final = frozenset({
    "vocab_size", "max_position_embeddings", "eos_token_ids", "bos_token_id", "dtype",
    "tie_word_embeddings",
})  # fmt: skip
_MAX_SHOWN = 5


def differences(donor: ModelConfig, variant: ModelConfig) -> list[str]:
    """Returns what keeps two models from running through one skeleton, field by field.

    Vocabulary, context length, special tokens, tying and float type belong to the variant and may
    differ. An empty list means one architecture signature.
    """
    a, b = asdict(donor), asdict(variant)
    return [
        line for field in a if field not in _OWN for line in _compare(field, a[field], b[field])
    ]


def check_same_family(donor: ModelConfig, variant: ModelConfig) -> None:
    """Refuses two models that cannot run through one skeleton; see `differences`.

    Raises:
        BadCheckpointError: Lists the fields that differ, with both values.
    """
    if found := differences(donor, variant):
        more = len(found) - _MAX_SHOWN
        raise BadCheckpointError(
            "The variant is no fine-tune of this donor: "
            + "; ".join(found[:_MAX_SHOWN])
            + (f"; and {more} more" if more > 0 else "")
            + ". Name another donor, or onboard it as a donor of its own."
        )


def _compare(field: str, donor: Any, variant: Any) -> Iterator[str]:
    """Yields the differences within one field, down to the entry of an object or a list."""
    if donor == variant:
        return
    if isinstance(donor, dict) and isinstance(variant, dict):
        for key in donor:
            yield from _compare(f"{field}.{key}", donor[key], variant[key])
        return
    if isinstance(donor, tuple) and isinstance(variant, tuple) and len(donor) == len(variant):
        for index, pair in enumerate(zip(donor, variant, strict=True)):
            yield from _compare(f"{field}[{index}]", *pair)
        return
    yield f"{field}: donor {donor!s:.60}, variant {variant!s:.60}"
