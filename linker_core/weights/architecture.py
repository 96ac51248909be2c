"""The shape of a model as its config.json states it, read by an allow-list and within bounds.

Reads configs written by transformers 4 and 5. Nothing in a config can name code to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from linker_core.errors import BadCheckpointError, UnsupportedFormatError
from linker_core.weights.fields import Fields

CONFIG_FILE = "config.json"
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FULL, SLIDING = "full_attention", "sliding_attention"
# The served rope types, whose frequencies depend on nothing but the config, and their settings.
_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    },
}  # fmt: skip
_ROPE_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


class Architecture(StrEnum):
    """The architectures that are served; the values are transformers' class names."""

    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"
    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"
    GEMMA2 = "Gemma2ForCausalLM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding. `kind` default has no further numbers, linear a factor, llama3 all four."""

    theta: float
    kind: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything about a model that its weights' shapes and its arithmetic depend on."""

    architecture: Architecture
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    dtype: str  # a key of DTYPE_BYTES, as the config declares it
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    layer_types: tuple[str, ...]  # FULL or SLIDING for each layer
    sliding_window: int | None  # tokens a sliding layer sees, itself included
    attention_bias: bool
    mlp_bias: bool
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    query_pre_attn_scalar: int | None  # Gemma 2 scales queries by its inverse root
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def parse_config(record: Mapping[str, Any], *, source: str = CONFIG_FILE) -> ModelConfig:
    """Reads a config.json that has been parsed as JSON.

    Args:
        record: The object in the file.
        source: How error messages call the file.

    Raises:
        UnsupportedFormatError: Another architecture, quantised weights, custom code, or another
            kind of rope.
        BadCheckpointError: A value that is missing, of another type or out of bounds.
    """
    fields = Fields(record, source)
    architecture = _architecture(fields)
    num_layers = fields.integer("num_hidden_layers", low=1, high=1024)
    num_heads = fields.integer("num_attention_heads", low=1, high=1024)
    hidden_size = fields.integer("hidden_size", low=1, high=1 << 17)
    num_kv_heads = _num_kv_heads(fields, architecture, num_heads)
    gemma2 = architecture is Architecture.GEMMA2
    window = _sliding_window(fields, architecture)
    bos = fields.token_ids("bos_token_id")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", low=1, high=1 << 20),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, architecture, hidden_size, num_heads),
        vocab_size=fields.integer("vocab_size", low=1, high=1 << 22),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=gemma2),
        dtype=fields.choice(
            "dtype" if record.get("dtype") is not None else "torch_dtype",
            tuple(DTYPE_BYTES),
            default="float32",
        ),
        max_position_embeddings=fields.integer("max_position_embeddings", low=1, high=1 << 24),
        rms_norm_eps=fields.number("rms_norm_eps", low=1e-12, high=0.1, default=1e-6),
        hidden_act=_hidden_act(fields, gemma2=gemma2),
        rope=_rope(fields),
        layer_types=_layer_types(fields, architecture, num_layers, window),
        sliding_window=window,
        attention_bias=_attention_bias(fields, architecture),
        mlp_bias=architecture is Architecture.LLAMA and fields.boolean("mlp_bias", default=False),
        attn_logit_softcapping=(
            _softcap(fields, "attn_logit_softcapping", default=50.0) if gemma2 else None
        ),
        final_logit_softcapping=(
            _softcap(fields, "final_logit_softcapping", default=30.0) if gemma2 else None
        ),
        query_pre_attn_scalar=(
            fields.integer("query_pre_attn_scalar", low=1, high=1 << 20, default=256)
            if gemma2
            else None
        ),
        eos_token_ids=fields.token_ids("eos_token_id"),
        bos_token_id=bos[0] if bos else None,
    )


def _architecture(fields: Fields) -> Architecture:
    record, source = fields.record, fields.source
    if record.get("auto_map") or record.get("trust_remote_code"):
        raise UnsupportedFormatError(
            f"{source}: names custom code (auto_map or trust_remote_code), which is never run. "
            "Export the model in one of the built-in architectures."
        )
    for key in ("quantization_config", "compression_config"):
        if record.get(key):
            raise UnsupportedFormatError(
                f"{source}: {key} is {record[key]!r:.60}, expected none: weights are quantised, "
                "and no donor's are. Give the bfloat16, float16 or float32 checkpoint."
            )
    named = record.get("architectures")
    known = [architecture.value for architecture in Architecture]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in known:
        raise UnsupportedFormatError(
            f"{source}: architectures is {named!r:.80}, expected one of {', '.join(known)}."
        )
    return Architecture(named[0])


def _num_kv_heads(fields: Fields, architecture: Architecture, num_heads: int) -> int:
    default = num_heads if architecture is Architecture.LLAMA else None
    num_kv_heads = fields.integer("num_key_value_heads", low=1, high=num_heads, default=default)
    if num_heads % num_kv_heads:
        raise fields.refuse("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads}")
    return num_kv_heads


def _head_dim(fields: Fields, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    default = {Architecture.QWEN3: 128, Architecture.GEMMA2: 256}.get(architecture)
    if default is None and hidden_size % num_heads == 0:
        default = hidden_size // num_heads
    head_dim = fields.integer("head_dim", low=2, high=1024, default=default)
    if head_dim % 2:
        raise fields.refuse("head_dim", head_dim, "an even number, since rope turns pairs")
    return head_dim


def _hidden_act(fields: Fields, *, gemma2: bool) -> str:
    default = "gelu_pytorch_tanh" if gemma2 else "silu"
    # transformers computes Gemma 2 with hidden_activation and ignores a hidden_act beside it
    key = "hidden_activation" if gemma2 else "hidden_act"
    return fields.choice(key, ("silu", "gelu", "gelu_pytorch_tanh", "relu"), default=default)


def _attention_bias(fields: Fields, architecture: Architecture) -> bool:
    if architecture is Architecture.QWEN2:
        return True  # q, k and v have biases whatever the config says; o has none
    if architecture is Architecture.MISTRAL:
        return False
    return fields.boolean("attention_bias", default=False)


def _sliding_window(fields: Fields, architecture: Architecture) -> int | None:
    if architecture is Architecture.LLAMA:
        return None
    if architecture in (Architecture.QWEN2, Architecture.QWEN3) and not fields.boolean(
        "use_sliding_window", default=False
    ):
        return None
    if "sliding_window" in fields.record and fields.record["sliding_window"] is None:
        return None
    return fields.integer("sliding_window", low=1, high=1 << 24, default=4096)


def _layer_types(
    fields: Fields, architecture: Architecture, num_layers: int, window: int | None
) -> tuple[str, ...]:
    if window is None:
        return (FULL,) * num_layers
    if architecture is Architecture.MISTRAL:
        return (SLIDING,) * num_layers
    stated = fields.record.get("layer_types")
    if stated is not None:
        if not isinstance(stated, list) or len(stated) != num_layers:
            raise fields.refuse("layer_types", stated, f"a list of {num_layers} names")
        if not all(kind in (FULL, SLIDING) for kind in stated):
            raise fields.refuse("layer_types", stated, f"made of {FULL} and {SLIDING}")
        return tuple(stated)
    if architecture is Architecture.GEMMA2:
        return tuple(FULL if layer % 2 else SLIDING for layer in range(num_layers))
    first_sliding = fields.integer("max_window_layers", low=0, high=1 << 16, default=28)
    return tuple(SLIDING if layer >= first_sliding else FULL for layer in range(num_layers))


def _softcap(fields: Fields, key: str, *, default: float) -> float | None:
    """Absent means Gemma 2's own cap; only an explicit null turns it off."""
    if key in fields.record and fields.record[key] is None:
        return None
    return fields.number(key, low=1e-3, high=1e6, default=default)


def _rope(fields: Fields) -> Rope:
    """Reads rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    stated = _rope_object(fields)
    rope = Fields(stated, f"{fields.source}: rope")
    theta_owner = rope if stated.get("rope_theta") is not None else fields
    theta = theta_owner.number("rope_theta", low=1.0, high=1e12, default=10_000.0)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UnsupportedFormatError(
            f"{fields.source}: rope type {kind!r:.40} is not served; default, linear and llama3 "
            "are."
        )
    if unknown := sorted(stated.keys() - _ROPE_KEYS[kind] - _ROPE_COMMON_KEYS):
        raise UnsupportedFormatError(
            f"{fields.source}: rope of type {kind} has no {', '.join(unknown)!r:.80}."
        )
    for holder in (fields, rope):
        if holder.number("partial_rotary_factor", low=0.0, high=1.0, default=1.0) != 1.0:
            raise UnsupportedFormatError(
                f"{fields.source}: partial rotary embeddings are not served."
            )
    if kind == "default":
        return Rope(theta=theta)
    factor = rope.number("factor", low=1.0, high=1e4)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=factor)
    low_freq = rope.number("low_freq_factor", low=1e-3, high=1e4)
    high_freq = rope.number("high_freq_factor", low=1e-3, high=1e4)
    if high_freq <= low_freq:
        raise BadCheckpointError(f"{rope.source}: high_freq_factor must exceed low_freq_factor.")
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=low_freq,
        high_freq_factor=high_freq,
        original_max_position=rope.integer("original_max_position_embeddings", low=1, high=1 << 24),
    )


def _rope_object(fields: Fields) -> Mapping[str, Any]:
    """Returns the one object that describes rope, empty where the config has none."""
    found = [
        fields.record[key]
        for key in ("rope_parameters", "rope_scaling")
        if fields.record.get(key) not in (None, {})
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise fields.refuse(
            "rope_scaling", found[1], "absent, or equal to rope_parameters beside it"
        )
    stated = found[0] if found else {}
    if not isinstance(stated, dict):
        raise fields.refuse("rope_parameters", stated, "an object")
    return stated
