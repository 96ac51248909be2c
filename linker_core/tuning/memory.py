"""What a tuner's pass takes on its device, for those who reserve it. Plain arithmetic."""

from __future__ import annotations

import math

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.weights.architecture import DTYPE_BYTES, ModelConfig
from linker_core.weights.keys import parse_key
from linker_core.weights.shapes import expected_tensors

ANSWER_SEQUENCES = 16  # that a variant answers at once for its own calibration
ANSWER_TOKENS = 96  # of one answer at most
MAX_PLANS_AT_ONCE = 4  # that a search prices in one walk
LOGITS_CHUNK_BYTES = 32 << 20  # float32 logits of some tokens under one plan
_LONGEST_SEQUENCE = 512  # tokens that are computed at once, however wide the model
_CUDA_CONTEXT_BYTES = 512 << 20  # that a process takes of a device before its first tensor


def tuning_bytes(
    donor: ModelConfig, variant: ModelConfig, *, num_tokens: int, num_plans: int, device: str
) -> int:
    """Returns the most bytes a pass holds: two blocks, embeddings and heads, states, logits.

    Args:
        donor: Shape of the donor.
        variant: Shape of the variant.
        num_tokens: Tokens of the calibration text, prompts included.
        num_plans: K, plans that are priced at once; the variant itself is one more.
        device: "cpu" or "cuda".
    """
    blocks = outside = 0
    for config in (donor, variant):
        for name, shape in expected_tensors(config).items():
            key = parse_key(name)
            assert key is not None
            nbytes = DTYPE_BYTES[config.dtype] * math.prod(shape)
            if key.layer == 0:
                blocks += nbytes
            elif key.layer is None:
                outside += nbytes
    states = (num_plans + 1) * num_tokens * variant.hidden_size * 4
    return blocks + outside + states + _working_bytes(variant, device)


def answering_bytes(variant: ModelConfig, *, max_prompt_tokens: int, device: str) -> int:
    """Returns the bytes of a stage before: the whole variant with pages for its own answers."""
    engine = EngineConfig(
        device="cuda" if device == "cuda" else "cpu",
        kv_cache_tokens=ANSWER_SEQUENCES * (max_prompt_tokens + ANSWER_TOKENS),
    )
    weights = sum(
        DTYPE_BYTES[variant.dtype] * math.prod(shape)
        for shape in expected_tensors(variant).values()
    )
    return weights + kv_cache_bytes(variant, engine) + _working_bytes(variant, device)


def activation_bytes(config: ModelConfig) -> int:
    """Returns what a row takes inside a block, float32.

    Gate, up and a packed copy of what they make; queries, keys and values, and what is attended;
    the residual stream before and behind its two parts, its norm and what is added to it.
    """
    attention = 2 * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return 4 * (3 * config.intermediate_size + attention + 6 * config.hidden_size)


def _working_bytes(config: ModelConfig, device: str) -> int:
    """Returns what is held beside weights and states: a chunk of logits, or activations."""
    # The variant's logits, a plan's, what is made of them, and the rows that they come from.
    logits = 4 * LOGITS_CHUNK_BYTES
    context = _CUDA_CONTEXT_BYTES if device == "cuda" else 0
    # Sensitivities put the donor's gate and up beside the variant's, as they are and multiplied.
    row = activation_bytes(config) + 4 * 4 * config.intermediate_size
    return context + max(logits, _LONGEST_SEQUENCE * row)
