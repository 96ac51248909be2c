"""The shape of made-up checkpoints in tests: the vocabulary of the real ones on tiny blocks."""

from __future__ import annotations

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16_000,
}  # fmt: skip
