"""The Hugging Face model of a family without its weights: parameters on `meta`, buffers real."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from linker_core.weights.architecture import Architecture, ModelConfig, Rope

_CONFIG_CLASSES: dict[Architecture, type[PretrainedConfig]] = {
    Architecture.QWEN2: Qwen2Config,
    Architecture.QWEN3: Qwen3Config,
    Architecture.LLAMA: LlamaConfig,
    Architecture.MISTRAL: MistralConfig,
    Architecture.GEMMA2: Gemma2Config,
}


def build_skeleton(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Returns the model of a shape in eval mode, its parameters on `meta`.

    Built from our own reading of the config, never from the checkpoint's file, so that nothing in
    the file reaches code that we have not checked.

    Args:
        config: Shape and arithmetic.
        device: Where buffers such as `inv_freq` go; they stay float32.
        dtype: Of the parameters to come.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            transformers_config(config), dtype=dtype
        )
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)
    skeleton = model.eval()
    assert isinstance(skeleton, PreTrainedModel)
    return skeleton


def transformers_config(config: ModelConfig) -> PretrainedConfig:
    """Returns transformers' configuration of the same model."""
    settings: dict[str, Any] = {
        "architectures": [config.architecture.value],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": _rope_parameters(config.rope),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": None,
    }
    return _CONFIG_CLASSES[config.architecture](**settings | _specific(config))


def _specific(config: ModelConfig) -> dict[str, Any]:
    """Returns the settings that only some architectures know."""
    if config.architecture is Architecture.GEMMA2:
        return {
            "hidden_activation": config.hidden_act,
            "attention_bias": config.attention_bias,
            "sliding_window": config.sliding_window,
            "layer_types": list(config.layer_types),
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
        }
    settings: dict[str, Any] = {"hidden_act": config.hidden_act}
    if config.architecture is Architecture.MISTRAL:
        settings["sliding_window"] = config.sliding_window
    if config.architecture in (Architecture.QWEN2, Architecture.QWEN3):
        settings["use_sliding_window"] = config.sliding_window is not None
        settings["sliding_window"] = config.sliding_window
        settings["layer_types"] = list(config.layer_types)
    if config.architecture in (Architecture.QWEN3, Architecture.LLAMA):
        settings["attention_bias"] = config.attention_bias
    if config.architecture is Architecture.LLAMA:
        settings["mlp_bias"] = config.mlp_bias
    return settings


def _rope_parameters(rope: Rope) -> dict[str, Any]:
    stated = {
        "rope_theta": rope.theta,
        "rope_type": rope.kind,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }
    return {name: value for name, value in stated.items() if value is not None}
