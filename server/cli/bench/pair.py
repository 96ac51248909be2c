"""A made-up donor and near copies of it, for benchmarks that need no real weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from linker_core.weights.architecture import parse_config
from linker_core.weights.shapes import expected_tensors

QWEN2: Final[Mapping[str, Any]] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Qwen2.5-0.5B: 988 MB in bfloat16.
HALF_BILLION: Final[Mapping[str, Any]] = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
}  # fmt: skip
# Small enough for some thirty forward passes in minutes on two cores, blocks far above the head.
SMALL: Final[Mapping[str, Any]] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 4096,
}  # fmt: skip


def write_pair(folder: Path, shape: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes a donor and a near copy; returns their directories. See `write_family`."""
    donor, variant = write_family(folder, shape, num_variants=1)
    return donor, variant


def write_family(folder: Path, shape: Mapping[str, Any], *, num_variants: int) -> list[Path]:
    """Writes a donor and near copies of it; returns their directories, the donor's first.

    A variant's words differ from the donor's in their last bit, at random: every block passes BS
    Eq. 3 at the conservative thresholds.

    Args:
        folder: An existing directory.
        shape: Sizes of a Qwen2, by the names of its config.json.
        num_variants: How many copies.
    """
    directories = [folder / "donor", *(folder / f"variant-{n + 1}" for n in range(num_variants))]
    config = {**QWEN2, **shape}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in expected_tensors(parse_config(config)).items():
        spread = 1.0 / math.sqrt(size[-1]) if len(size) == 2 else 0.02
        weight = torch.randn(size, generator=generator).mul_(spread)
        tensors[name] = (1 + weight if "norm" in name else weight).bfloat16()
    for number, directory in enumerate(directories):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        _byte_tokenizer().save(str(directory / "tokenizer.json"))
        if number > 0:
            for tensor in tensors.values():
                flips = torch.randint(2, tensor.shape, generator=generator, dtype=torch.int16)
                tensor.view(torch.int16).bitwise_xor_(flips)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directories


def _byte_tokenizer() -> Tokenizer:
    """Returns a tokenizer with a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
