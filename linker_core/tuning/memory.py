"""What a tuner's pass takes on its device, for those who reserve it. Plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.residency.encoding_memory import CHUNK_WEIGHTS, sketch_size
from linker_core.sharing.rungs import residual_bytes
from linker_core.tuning.offered import OFFERED, offered_rungs
from linker_core.weights.architecture import DTYPE_BYTES, ModelConfig
from linker_core.weights.keys import parse_key
from linker_core.weights.shapes import expected_tensors

ANSWER_SEQUENCES = 16  # that a variant answers at once for its own calibration
ANSWER_TOKENS = 96  # of one answer at most
MAX_PLANS_AT_ONCE = 4  # that a search prices in one walk
SAMPLE_ROWS = 256  # of a text, on which the errors of rungs are compared
LOGITS_CHUNK_BYTES = 32 << 20  # float32 logits of some tokens under one plan
_LONGEST_SEQUENCE = 512  # tokens that are computed at once, however wide the model
# Of all sketches of one matrix' delta that the offered ranks need.
_SKETCH_COLUMNS = sum({sketch_size(rung.rank) for rung in OFFERED if rung.rank})
_SKETCH_COPIES = 6  # of one matrix' sketches, while factors are made of them
_CUDA_CONTEXT_BYTES = 512 << 20  # that a process takes of a device before its first tensor


def tuning_bytes(
    donor: ModelConfig, variant: ModelConfig, *, num_tokens: int, num_plans: int, device: str
) -> int:
    """Returns the most bytes a pass holds: two blocks, the ends, residuals, states and workings.

    Args:
        donor: Shape of the donor.
        variant: Shape of the variant.
        num_tokens: Tokens of the calibration text, prompts included.
        num_plans: K, plans that are priced at once; the variant itself is one more.
        device: "cpu" or "cuda".
    """
    weights = sum(
        DTYPE_BYTES[config.dtype] * math.prod(shape)
        for config in (donor, variant)
        for shape in _held_shapes(config)
    )
    matrices = [shape for shape in _held_shapes(variant) if len(shape) == 2]
    own_bytes = DTYPE_BYTES[variant.dtype]
    residuals = num_plans * sum(_dearest_residual(shape, own_bytes) for shape in matrices)
    states = (num_plans + 1) * num_tokens * variant.hidden_size * 4
    working = _encoding_bytes(matrices) + _working_bytes(variant, device)
    return weights + residuals + states + working


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


def _held_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Returns the shapes of a block's tensors and of those outside the blocks."""
    shapes = []
    for name, shape in expected_tensors(config).items():
        key = parse_key(name)
        assert key is not None
        if key.layer in (0, None):
            shapes.append(shape)
    return shapes


def _dearest_residual(shape: tuple[int, ...], own_bytes: int) -> int:
    """Returns the most that a matrix of elements of `own_bytes` takes on an offered rung."""
    rows, width = shape
    offered = offered_rungs(rows, width, element_bytes=own_bytes)
    return max((residual_bytes(rung, rows, width) for rung in offered), default=0)


def _encoding_bytes(matrices: Sequence[tuple[int, ...]]) -> int:
    """Returns what encoders keep of their deltas, and what the largest matrix takes meanwhile."""
    sketches = [4 * _SKETCH_COLUMNS * (rows + width) for rows, width in matrices]
    chunks = 8 * max(4 * CHUNK_WEIGHTS, *(4 * width for _, width in matrices))
    return sum(sketches) + _SKETCH_COPIES * max(sketches) + chunks


def _probing_bytes(config: ModelConfig) -> int:
    """Returns what is kept of a block's products, and what comparing one of them takes."""
    attention = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    inputs = 4 * config.hidden_size + config.num_heads * config.head_dim
    kept = inputs + attention + 3 * config.intermediate_size + 3 * config.hidden_size
    widest = max(config.intermediate_size, config.hidden_size, attention)
    return 4 * SAMPLE_ROWS * (2 * kept + 12 * widest)


def _working_bytes(config: ModelConfig, device: str) -> int:
    """Returns what is held beside weights and states: a chunk of logits, or activations."""
    # The variant's logits, a plan's, what is made of them, and the rows that they come from.
    logits = 4 * LOGITS_CHUNK_BYTES
    context = _CUDA_CONTEXT_BYTES if device == "cuda" else 0
    # Sensitivities keep copies of the stream beside what the block takes.
    row = activation_bytes(config) + 4 * 4 * config.hidden_size
    return context + max(logits, _LONGEST_SEQUENCE * row) + _probing_bytes(config)
