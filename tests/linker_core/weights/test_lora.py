"""PEFT folders: what is read of them, and that whatever is not served is refused by name."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from linker_core.errors import BadCheckpointError, LinkerError, UnsupportedFormatError
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.lora import LoraAdapter, is_adapter
from linker_core.weights.lora_config import ADAPTER_CONFIG, LoraConfig
from tests.lora import CONFIG, EMBED, FILE, HEAD, make_adapter
from tests.tiny import make_checkpoint

Q0 = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{Q0}.lora_"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bases") / "untied", tie=False)


@pytest.fixture(scope="module")
def config(base: Path) -> ModelConfig:
    with Checkpoint.open(base) as checkpoint:
        return checkpoint.config


@pytest.fixture
def path(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((path / ADAPTER_CONFIG).read_text())
    change(record)
    (path / ADAPTER_CONFIG).write_text(json.dumps(record))


def edit_state(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path / FILE)
    change(state)
    save_file(state, path / FILE)


@pytest.mark.parametrize("infix", ["", ".default"])
def test_open_pairs_are_in_order_and_read_whole(
    tmp_path: Path, base: Path, config: ModelConfig, infix: str
) -> None:
    path = make_adapter(tmp_path / "adapter", base, infix=infix, targets=("proj", EMBED, HEAD))
    state = load_file(path / FILE)
    with LoraAdapter.open(path, config) as adapter, Checkpoint.open(base) as checkpoint:
        matrices = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2]
        assert list(adapter.pairs) == matrices
        assert [n for n, pair in adapter.pairs.items() if pair.transposed] == [f"{EMBED}.weight"]
        assert {pair.scaling for pair in adapter.pairs.values()} == {6 / 4}
        assert {pair.rank for pair in adapter.pairs.values()} == {4}
        for pair in adapter.pairs.values():
            for factor in (pair.a, pair.b):
                words = torch.frombuffer(adapter.read(factor), dtype=torch.float32)
                assert torch.equal(words.view(factor.shape), state[factor.name])
    assert is_adapter(path)
    assert not is_adapter(base)


@pytest.mark.parametrize(
    ("record", "scaling"),
    [
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {"q_proj": 4}}, 1.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"self_attn.q_proj": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {f"^{Q0}": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^q_proj": 2}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"proj": 2}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 1, Q0: 2}}, 0.25),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {Q0: 16}, "use_rslora": True}, 2.0),
        ({}, 1.0),
    ],
)
def test_scaling_is_alpha_over_r_or_its_root(record: dict[str, Any], scaling: float) -> None:
    config = LoraConfig.parse({"peft_type": "LORA", **record})
    assert math.isclose(config.scaling_of(Q0), scaling)


def test_open_ranks_of_their_own_are_taken_from_the_pattern(
    tmp_path: Path, base: Path, config: ModelConfig
) -> None:
    pattern = {"layers.1.self_attn.q_proj": 2}
    ranks = {"model.layers.1.self_attn.q_proj": 2}
    path = make_adapter(tmp_path / "adapter", base, ranks=ranks, rank_pattern=pattern)
    with LoraAdapter.open(path, config) as adapter:
        assert adapter.pairs["model.layers.1.self_attn.q_proj.weight"].scaling == 3.0
        assert adapter.pairs["model.layers.0.self_attn.q_proj.weight"].scaling == 1.5
    edit_config(path, lambda record: record.pop("rank_pattern"))
    with pytest.raises(
        BadCheckpointError, match=r"layers\.1\.self_attn\.q_proj.*ask for \[4, 48\]"
    ):
        LoraAdapter.open(path, config)


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "IA3"}, {"peft_type": None}, {"peft_type": "ADALORA"}, {"bias": "all"},
        {"bias": "lora_only"}, {"task_type": "SEQ_CLS"}, {"use_dora": True},
        {"fan_in_fan_out": True}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True},
        {"trainable_token_indices": [1]}, {"layer_replication": [[0, 1]]},
        {"target_parameters": ["x"]}, {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": ["gaussian"]}, {"auto_map": {"AutoModel": "x.Y"}},
        {"use_qalora": True}, {"loftq_config": {"loftq_bits": 4}}, {"what_comes_next": 1},
        {"alora_invocation_tokens": [1]}, {"rank_pattern": {"(a+)+$": 4}},
        {"alpha_pattern": {".*q_proj": 4}}, {"alpha_pattern": {"": 4}},
    ],
)  # fmt: skip
def test_open_setting_that_is_not_served_is_named(
    path: Path, config: ModelConfig, setting: dict[str, Any]
) -> None:
    edit_config(path, lambda record: record.update(setting))
    with pytest.raises(UnsupportedFormatError, match=next(iter(setting))) as caught:
        LoraAdapter.open(path, config)
    assert "erge" in caught.value.message


@pytest.mark.parametrize(
    "setting",
    [
        {"r": 0}, {"r": "4"}, {"r": 10**6}, {"r": 4.0}, {"r": True}, {"lora_alpha": "x"},
        {"lora_alpha": 1e300}, {"use_rslora": 1}, {"rank_pattern": []},
        {"rank_pattern": {"q_proj": 0}}, {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": "q"},
    ],
)  # fmt: skip
def test_open_impossible_setting_is_refused(
    path: Path, config: ModelConfig, setting: dict[str, Any]
) -> None:
    edit_config(path, lambda record: record.update(setting))
    with pytest.raises(BadCheckpointError, match=ADAPTER_CONFIG):
        LoraAdapter.open(path, config)


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        (f"{STEM}magnitude_vector", UnsupportedFormatError, "DoRA"),
        (f"{STEM}B.bias", UnsupportedFormatError, "only LoRA's A and B"),
        ("base_model.model.lm_head.weight", UnsupportedFormatError, "only LoRA's A and B"),
        (f"base_model.model.{Q0}.base_layer.weight", UnsupportedFormatError, "only LoRA's"),
        (f"{STEM}A.other.weight", UnsupportedFormatError, "only LoRA's"),
        (f"{Q0}.lora_A.weight", UnsupportedFormatError, "only LoRA's"),
        (f"{STEM}A.default.weight", BadCheckpointError, "the same factor twice"),
        ("base_model.model.score.lora_A.weight", BadCheckpointError, "no linear layer"),
        ("base_model.model.model.norm.lora_A.weight", BadCheckpointError, "no linear layer"),
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", BadCheckpointError, "9"),
        ("base_model.model.lm_head.lora_A.weight", BadCheckpointError, "one A and one B"),
        ("base_model.model.lm_head.lora_embedding_A", BadCheckpointError, "one A and one B"),
        ("base_model.model.model.embed_tokens.lora_A.weight", BadCheckpointError, "one A"),
    ],
)
def test_open_tensor_that_is_no_factor_is_refused(
    path: Path, config: ModelConfig, name: str, kind: type[LinkerError], why: str
) -> None:
    edit_state(path, lambda state: state.update({name: torch.zeros(4, 48)}))
    with pytest.raises(kind, match=why):
        LoraAdapter.open(path, config)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_open_factors_of_the_other_kind_are_refused(
    tmp_path: Path, base: Path, config: ModelConfig, kind: str
) -> None:
    path = make_adapter(tmp_path / "adapter", base, targets=(EMBED, HEAD))
    embedding, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head"

    def swap(state: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            if kind == "linear":
                state[f"{embedding}.lora_{side}.weight"] = state.pop(
                    f"{embedding}.lora_embedding_{side}"
                )
            else:
                state[f"{head}.lora_embedding_{side}"] = state.pop(f"{head}.lora_{side}.weight")

    edit_state(path, swap)
    with pytest.raises(BadCheckpointError, match="one A and one B are needed"):
        LoraAdapter.open(path, config)


@pytest.mark.parametrize("shape", [(4, 47), (3, 48), (48, 4), (4,), (4, 48, 1)])
def test_open_factor_that_does_not_fit_the_base_is_refused(
    path: Path, config: ModelConfig, shape: tuple[int, ...]
) -> None:
    edit_state(path, lambda state: state.update({f"{STEM}A.weight": torch.zeros(shape)}))
    with pytest.raises(BadCheckpointError, match=r"q_proj\.lora_A\.weight is .*Name the base"):
        LoraAdapter.open(path, config)


def test_open_missing_factor_is_refused(path: Path, config: ModelConfig) -> None:
    edit_state(path, lambda state: state.pop(f"{STEM}B.weight"))
    with pytest.raises(BadCheckpointError, match="one A and one B"):
        LoraAdapter.open(path, config)


def test_open_without_factors_is_refused(path: Path, config: ModelConfig) -> None:
    edit_state(path, dict.clear)
    with pytest.raises(BadCheckpointError, match="no factors"):
        LoraAdapter.open(path, config)


@pytest.mark.parametrize("module", [EMBED, HEAD])
def test_open_embedding_or_head_of_a_tied_base_is_unsupported(
    tmp_path: Path, base: Path, module: str
) -> None:
    path = make_adapter(tmp_path / "adapter", base, targets=(module, "q_proj"))
    tied = make_checkpoint(tmp_path / "tied")
    with (
        Checkpoint.open(tied) as checkpoint,
        pytest.raises(UnsupportedFormatError, match="ties embedding and head"),
    ):
        LoraAdapter.open(path, checkpoint.config)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "modeling_x.py"])
@pytest.mark.parametrize("sole", [True, False])
def test_open_pickle_or_code_is_never_opened(
    path: Path, config: ModelConfig, name: str, sole: bool
) -> None:
    if sole:
        (path / FILE).unlink()
    (path / name).write_bytes(b"never opened")
    with pytest.raises(UnsupportedFormatError, match=name):
        LoraAdapter.open(path, config)


@pytest.mark.parametrize("file", [FILE, ADAPTER_CONFIG])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "missing", "truncated"])
def test_open_irregular_file_is_refused_at_once(
    path: Path, config: ModelConfig, file: str, kind: str
) -> None:
    if kind == "truncated":
        os.truncate(path / file, (path / file).stat().st_size - 3)
    else:
        (path / file).rename(path / "kept")
    if kind == "symlink":
        (path / file).symlink_to("kept")
    elif kind == "fifo":
        os.mkfifo(path / file)
    with pytest.raises(BadCheckpointError, match=file):
        LoraAdapter.open(path, config)


def test_read_of_a_file_that_became_shorter_is_refused(path: Path, config: ModelConfig) -> None:
    with LoraAdapter.open(path, config) as adapter:
        os.truncate(path / FILE, 2000)
        last = list(adapter.pairs.values())[-1]
        with pytest.raises(BadCheckpointError, match="became shorter"):
            adapter.read(last.b)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(key=st.sampled_from(sorted({*CONFIG, "auto_map", "new"})), value=_JSON)
def test_any_setting_is_read_or_refused_by_name(key: str, value: Any) -> None:
    try:
        config = LoraConfig.parse(CONFIG | {key: value})
    except LinkerError as error:
        named = key in error.message
    else:
        named = math.isfinite(config.scaling_of(Q0))
    assert named
