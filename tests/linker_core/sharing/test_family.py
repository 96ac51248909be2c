"""What keeps two models from sharing a skeleton is said field by field, with both values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from linker_core.errors import BadCheckpointError
from linker_core.sharing.family import check_same_family, differences
from linker_core.weights.architecture import ModelConfig, Rope, parse_config

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 300, "max_position_embeddings": 256, "dtype": "bfloat16",
    "sliding_window": 12,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def config(**changes: Any) -> ModelConfig:
    return parse_config(CONFIG | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32}, "hidden_size: donor 64, variant 32"),
        ({"num_hidden_layers": 3}, "num_layers: donor 4, variant 3"),
        ({"rope_theta": 1e6}, "rope.theta: donor 10000.0, variant 1000000.0"),
        ({"rope_parameters": LLAMA3}, "rope.kind: donor default, variant llama3"),
        ({"rope_parameters": LLAMA3}, "rope.factor: donor None, variant 8.0"),
        ({"architectures": ["LlamaForCausalLM"]}, "donor Gemma2ForCausalLM, variant LlamaForC"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: donor 1e-06, variant 1e-05"),
        (
            {"layer_types": ["full_attention", *["sliding_attention", "full_attention"] * 2][:4]},
            "layer_types[0]: donor sliding_attention, variant full_attention",
        ),
        ({"final_logit_softcapping": None}, "final_logit_softcapping: donor 30.0, variant None"),
    ],
)
def test_field_that_differs_is_named_with_both_values(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadCheckpointError) as refusal:
        check_same_family(config(), config(**changes))
    assert said in refusal.value.message


def test_differences_beyond_the_shown_are_counted() -> None:
    other = config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-5,
    )  # fmt: skip
    with pytest.raises(BadCheckpointError, match=r"and [0-9]+ more"):
        check_same_family(config(), other)


def test_what_belongs_to_the_variant_may_differ() -> None:
    variant = replace(
        config(), vocab_size=512, max_position_embeddings=64, eos_token_ids=(7,), bos_token_id=3,
        dtype="float32", tie_word_embeddings=False,
    )  # fmt: skip
    assert differences(config(), variant) == []


def test_every_other_field_makes_another_signature() -> None:
    donor = config()
    own = {
        "vocab_size", "max_position_embeddings", "eos_token_ids", "bos_token_id", "dtype",
        "tie_word_embeddings",
    }  # fmt: skip
    for field in ModelConfig.__dataclass_fields__.keys() - own:
        changed: Any = Rope(theta=5.0) if field == "rope" else "another"
        assert differences(donor, replace(donor, **{field: changed})), field
