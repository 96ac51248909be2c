from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linker_core.errors import BadCheckpointError, LinkerError, UnsupportedFormatError
from linker_core.residency.skeleton import transformers_config
from linker_core.weights.architecture import FULL, SLIDING, Rope, parse_config
from linker_core.weights.keys import LM_HEAD_NAME, Section, parse_key
from linker_core.weights.shapes import expected_tensors
from tests.tiny import ARCHITECTURES, make_checkpoint


def record(**changes: Any) -> dict[str, Any]:
    base = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "torch_dtype": "bfloat16",
    }
    return {key: value for key, value in (base | changes).items() if value != "absent"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_expected_tensors_are_those_of_transformers(
    tmp_path: Path, architecture: str, tie: bool
) -> None:
    path = make_checkpoint(tmp_path / "m", architecture=architecture, tie=tie)
    with torch.device("meta"):
        kind = AutoModelForCausalLM
        model = kind.from_config(AutoConfig.from_pretrained(path))  # type: ignore[no-untyped-call]
    theirs = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if tie:
        del theirs[LM_HEAD_NAME]
    config = parse_config(json.loads((path / "config.json").read_text()))
    assert expected_tensors(config) == theirs


def test_parse_config_written_by_transformers_4_and_5_agree() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    four = record(architectures=["LlamaForCausalLM"], rope_theta=5e5, rope_scaling=scaling)
    five = record(
        architectures=["LlamaForCausalLM"],
        rope_parameters=scaling | {"rope_theta": 5e5},
        torch_dtype="absent",
        dtype="bfloat16",
    )
    assert parse_config(four) == parse_config(five)
    assert parse_config(five).rope == Rope(
        theta=5e5,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )


def test_parse_config_qwen2_windows_only_from_max_window_layers_on() -> None:
    config = parse_config(record(use_sliding_window=True, sliding_window=8, max_window_layers=1))
    assert config.layer_types == (FULL, SLIDING)
    assert parse_config(record(sliding_window=8)).layer_types == (FULL, FULL)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedFormatError, "Qwen2ForCausalLM"),
        ({"architectures": "absent"}, UnsupportedFormatError, "architectures"),
        ({"auto_map": {"AutoModel": "x.Y"}}, UnsupportedFormatError, "custom code"),
        ({"trust_remote_code": True}, UnsupportedFormatError, "custom code"),
        ({"quantization_config": {"bits": 4}}, UnsupportedFormatError, "quantised"),
        ({"num_hidden_layers": 10**9}, BadCheckpointError, "num_hidden_layers"),
        ({"vocab_size": 2**31}, BadCheckpointError, "vocab_size"),
        ({"hidden_size": 0}, BadCheckpointError, "hidden_size"),
        ({"hidden_size": True}, BadCheckpointError, "hidden_size"),
        ({"hidden_size": "48"}, BadCheckpointError, "hidden_size"),
        ({"hidden_size": "absent"}, BadCheckpointError, "missing"),
        ({"hidden_size": 50}, BadCheckpointError, "head_dim"),
        ({"num_key_value_heads": 3}, BadCheckpointError, "divisor"),
        ({"rms_norm_eps": 5}, BadCheckpointError, "rms_norm_eps"),
        ({"rope_theta": -1}, BadCheckpointError, "rope_theta"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, UnsupportedFormatError, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedFormatError, "longrope"),
        ({"rope_scaling": [1]}, BadCheckpointError, "rope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, UnsupportedFormatError, "yarn"),
        ({"rope_scaling": {"factor": 4.0}}, UnsupportedFormatError, "has no 'factor'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            UnsupportedFormatError,
            "full_attention",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            BadCheckpointError,
            "rope_parameters beside it",
        ),
        ({"partial_rotary_factor": 0.5}, UnsupportedFormatError, "partial"),
        ({"hidden_act": "__import__"}, BadCheckpointError, "hidden_act"),
        ({"torch_dtype": "float8"}, BadCheckpointError, "torch_dtype"),
        ({"tie_word_embeddings": "yes"}, BadCheckpointError, "tie_word_embeddings"),
        ({"eos_token_id": [-1]}, BadCheckpointError, "eos_token_id"),
    ],
)
def test_parse_config_out_of_bounds_is_refused(
    changes: dict[str, Any], error: type[LinkerError], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_config(record(**changes))


def test_parse_config_any_width_that_shapes_allow_is_accepted() -> None:
    config = parse_config(record(hidden_size=42, head_dim=6, num_attention_heads=6, vocab_size=513))
    shapes = expected_tensors(config)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (36, 42)
    assert sum(map(math.prod, shapes.values())) > 0


@pytest.mark.parametrize(
    ("name", "section", "layer"),
    [
        ("model.embed_tokens.weight", Section.EMBED, None),
        ("model.layers.10.self_attn.q_norm.weight", Section.BLOCKS, 10),
        ("model.norm.weight", Section.FINAL_NORM, None),
        ("lm_head.weight", Section.LM_HEAD, None),
    ],
)
def test_parse_key_known_name_has_its_place(name: str, section: Section, layer: int | None) -> None:
    key = parse_key(name)
    assert key is not None
    assert (key.section, key.layer) == (section, layer)


@pytest.mark.parametrize(
    "name", ["model.layers.01.a.b", "model.layers.1", "x", "model.layers.-1.a.b"]
)
def test_parse_key_unknown_name_has_none(name: str) -> None:
    assert parse_key(name) is None


# What each architecture's config may leave out, and what transformers then takes.
LEFT_OUT = {
    "qwen2": ["sliding_window", "use_sliding_window", "layer_types", "rms_norm_eps", "hidden_act"],
    "qwen3": ["sliding_window", "layer_types", "attention_bias", "rms_norm_eps", "hidden_act"],
    "llama": ["attention_bias", "mlp_bias", "rms_norm_eps", "hidden_act", "head_dim"],
    "mistral": ["sliding_window", "rms_norm_eps", "hidden_act", "head_dim"],
    "gemma2": [
        "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
        "query_pre_attn_scalar", "hidden_activation", "attention_bias", "rms_norm_eps",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "key"), [(name, key) for name, keys in LEFT_OUT.items() for key in keys]
)
def test_absent_key_means_what_transformers_takes_it_to_mean(
    tmp_path: Path, architecture: str, key: str
) -> None:
    path = make_checkpoint(tmp_path / "m", architecture=architecture)
    stated = json.loads((path / "config.json").read_text())
    stated.pop(key, None)
    (path / "config.json").write_text(json.dumps(stated))
    theirs = AutoConfig.from_pretrained(path)
    ours = transformers_config(parse_config(stated))
    for name in LEFT_OUT[architecture]:
        assert getattr(ours, name, None) == getattr(theirs, name, None), name


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_explicit_null_turns_a_soft_cap_off(tmp_path: Path, key: str) -> None:
    path = make_checkpoint(tmp_path / "m", architecture="gemma2")
    stated = json.loads((path / "config.json").read_text()) | {key: None}
    assert getattr(parse_config(stated), key) is None
