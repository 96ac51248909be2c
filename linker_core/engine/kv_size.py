"""What the KV cache of a family takes, for those who plan without torch."""

from __future__ import annotations

from linker_core.config import EngineConfig
from linker_core.weights.architecture import ModelConfig

_ITEM_BYTES = {"cpu": 4, "cuda": 2}  # float32 and bfloat16 activations


def kv_cache_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Returns the exact bytes of keys and values that a family of `model` gets."""
    num_pages = max(1, config.kv_cache_tokens // config.page_tokens)
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return per_token * num_pages * config.page_tokens * _ITEM_BYTES[config.device]
