"""Bytes of N resident variants from a model's shape alone (BS tables 4 and 14)."""

from __future__ import annotations

import math
from typing import NamedTuple

from linker_core.errors import InvalidRequestError
from linker_core.weights.architecture import DTYPE_BYTES, ModelConfig
from linker_core.weights.keys import parse_key
from linker_core.weights.shapes import expected_tensors


class Footprint(NamedTuple):
    """Bytes of one model, of N separate copies, and of a donor with N - 1 linked variants."""

    single_bytes: int
    naive_bytes: int
    linked_bytes: int


def footprint(
    config: ModelConfig, *, num_variants: int, shared_blocks: int | None, dtype: str
) -> Footprint:
    """Returns exact bytes; BS algorithm 1's |A| + Σ |unique(B)|.

    Args:
        config: Shape of the family.
        num_variants: N, the donor included; at least 1.
        shared_blocks: Blocks each variant aliases; None means all.
        dtype: A key of DTYPE_BYTES.

    Raises:
        InvalidRequestError: More shared blocks than the model has, or fewer than one variant.
    """
    if shared_blocks is None:
        shared_blocks = config.num_layers
    if not 0 <= shared_blocks <= config.num_layers:
        raise InvalidRequestError(
            f"shared_blocks is {shared_blocks}, the model has {config.num_layers} blocks.",
            param="shared_blocks",
        )
    if num_variants < 1:
        raise InvalidRequestError(
            f"variants is {num_variants}, expected 1 or more.", param="variants"
        )
    item_bytes = DTYPE_BYTES[dtype]
    single = block = 0
    for name, shape in expected_tensors(config).items():
        nbytes = math.prod(shape) * item_bytes
        single += nbytes
        key = parse_key(name)
        assert key is not None
        block += nbytes if key.layer == 0 else 0
    unique = single - shared_blocks * block
    return Footprint(single, num_variants * single, single + (num_variants - 1) * unique)
