"""Small donors and variants with known deltas, written as real checkpoint directories."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from linker_core.weights.architecture import parse_config
from linker_core.weights.shapes import expected_tensors

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma2")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CLASSES: dict[str, tuple[type[PretrainedConfig], str]] = {
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
    "llama": (LlamaConfig, "LlamaForCausalLM"),
    "mistral": (MistralConfig, "MistralForCausalLM"),
    "gemma2": (Gemma2Config, "Gemma2ForCausalLM"),
}
_ROPE_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
# What makes each architecture itself: windows, soft caps, scalings, small enough to matter here.
_EXTRAS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "llama": {"rope_parameters": _ROPE_LLAMA3},
    "mistral": {"sliding_window": 12},
    "gemma2": {
        "head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
    },
}  # fmt: skip


def make_checkpoint(  # noqa: PLR0913 - the knobs of a fixture
    path: Path,
    *,
    architecture: str = "qwen2",
    vocab_size: int = 512,
    seed: int = 0,
    dtype: str = "bfloat16",
    layers: int = 2,
    hidden: int = 48,
    intermediate: int = 80,
    tie: bool = True,
    added_tokens: Sequence[str] = (),
    shards: int = 1,
) -> Path:
    """A random model whose logits differ clearly from token to token.

    Weights are normal with standard deviation 1/sqrt(fan in), biases and norms of order one.
    """
    kind, class_name = _CLASSES[architecture]
    settings: dict[str, Any] = {
        "vocab_size": vocab_size + len(added_tokens),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "architectures": [class_name],
        "dtype": dtype,
    }
    path.mkdir(parents=True)
    kind(**settings, **_EXTRAS[architecture]).save_pretrained(path)
    record = json.loads((path / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: _random(name, shape, generator).to(_DTYPES[dtype])
        for name, shape in expected_tensors(parse_config(record)).items()
    }
    save_state(path, state, shards=shards)
    write_tokenizer(path, vocab_size=vocab_size, added_tokens=added_tokens)
    return path


def make_variant(
    path: Path,
    donor: Path,
    *,
    scale: float | Mapping[str, float],
    seed: int = 1,
    added_tokens: Sequence[str] = (),
    rows: Mapping[str, Iterable[int]] | None = None,
) -> Path:
    """Donor plus a delta whose norm is exactly `scale` times the tensor's (before rounding).

    Args:
        path: Directory to write.
        donor: Checkpoint of `make_checkpoint` with one shard.
        scale: One number, or name -> number (absent names keep the donor's bytes).
        seed: Of the deltas.
        added_tokens: New tokens; embedding and head get a random row for each.
        rows: Name -> rows that get random values in the place of what they are otherwise.
    """
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    state = load_file(donor / "model.safetensors")
    for name, tensor in state.items():
        factor = scale.get(name, 0.0) if isinstance(scale, Mapping) else scale
        if factor:
            delta = torch.randn(tensor.shape, generator=generator)
            delta *= factor * tensor.float().norm() / delta.norm()
            state[name] = (tensor.float() + delta).to(tensor.dtype)
    for name, indices in (rows or {}).items():
        for index in indices:
            state[name][index] = _random(name, (1, state[name].shape[1]), generator)[0]
    record = json.loads((donor / "config.json").read_text())
    vocab_size = record["vocab_size"]
    if added_tokens:
        record["vocab_size"] = vocab_size + len(added_tokens)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in state:
                new = _random(name, (len(added_tokens), record["hidden_size"]), generator)
                state[name] = torch.cat([state[name], new.to(state[name].dtype)])
    (path / "config.json").write_text(json.dumps(record))
    save_state(path, state)
    write_tokenizer(path, vocab_size=vocab_size, added_tokens=added_tokens)
    return path


def retyped(path: Path, source: Path, dtype: str) -> Path:
    """The same model in another float type, rounded where that is narrower."""
    shutil.copytree(source, path)
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(record | {"dtype": dtype}))
    state = load_file(source / "model.safetensors")
    save_state(path, {name: tensor.to(_DTYPES[dtype]) for name, tensor in state.items()})
    return path


def save_state(path: Path, state: Mapping[str, torch.Tensor], *, shards: int = 1) -> None:
    """Writes tensors as one safetensors file, or as shards with their index."""
    if shards == 1:
        save_file(dict(state), path / "model.safetensors", metadata={"format": "pt"})
        return
    names: list[str] = list(state)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[number::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(path: Path, *, vocab_size: int, added_tokens: Sequence[str] = ()) -> None:
    """A byte-level tokenizer of `vocab_size` tokens, ChatML template and generation defaults.

    The tokens are three special ones, the 256 bytes, then pairs of bytes, so every id has a text.
    """
    tokenizer = byte_level_tokenizer(vocab_size)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added_tokens])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[2], "bos_token": None, "tokenizer_class": "TokenizersBackend"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(CHATML)
    generation = {"bos_token_id": 0, "eos_token_id": [2], "do_sample": False}
    (path / "generation_config.json").write_text(json.dumps(generation))


def byte_level_tokenizer(vocab_size: int) -> Tokenizer:
    """Three special tokens, 256 bytes, and pairs of bytes up to `vocab_size`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert vocab_size >= len(SPECIAL) + len(alphabet)
    tokens = [*SPECIAL, *alphabet]
    merges = list(itertools.islice(itertools.product(alphabet, alphabet), vocab_size - len(tokens)))
    tokens += [a + b for a, b in merges]
    assert len(tokens) == vocab_size
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.2 * values if "norm" in name else 0.2 * values
    return values if "embed" in name else values / shape[1] ** 0.5
