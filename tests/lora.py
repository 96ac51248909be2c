"""Small LoRA adapters as PEFT writes them, and the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TARGETS = ("q_proj", "v_proj", "down_proj")
EMBED, HEAD = "model.embed_tokens", "lm_head"


def make_adapter(
    path: Path,
    base: Path,
    *,
    rank: int = 4,
    targets: Sequence[str] = TARGETS,
    dtype: torch.dtype = torch.float32,
    seed: int = 7,
    infix: str = "",
    ranks: Mapping[str, int] | None = None,
    **config: Any,
) -> Path:
    """Writes factors for every linear layer whose name ends with a target.

    Args:
        path: Directory to write.
        base: Checkpoint of `make_checkpoint` with one shard.
        rank: Of the factors.
        targets: Ends of module names; the embedding is one, too.
        dtype: Of the factors.
        seed: Of the factors.
        infix: ".default", as PEFT names them inside a model.
        ranks: Module -> another rank.
        config: Over what adapter_config.json says.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or not module.endswith(tuple(targets)):
            continue
        r = (ranks or {}).get(module, rank)
        rows, width = weight.shape[::-1] if module == EMBED else weight.shape
        stem = f"base_model.model.{module}.lora_{'embedding_' if module == EMBED else ''}"
        end = infix if module == EMBED else f"{infix}.weight"
        state[f"{stem}A{end}"] = torch.randn(r, width, generator=generator) / width**0.5
        state[f"{stem}B{end}"] = torch.randn(rows, r, generator=generator) * 0.2
    path.mkdir(parents=True)
    save_file({k: v.to(dtype).contiguous() for k, v in state.items()}, path / FILE)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": rank} | config))
    return path


FILE = "adapter_model.safetensors"
# What PEFT 0.17 writes for a plain adapter.
CONFIG: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "acme/base",
    "bias": "none", "corda_config": None, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 6, "lora_bias": False, "lora_dropout": 0.05,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "peft_type": "LORA", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def merge(path: Path, base: Path, adapter: Path, scalings: Mapping[str, float] | float) -> Path:
    """Writes the base with an adapter merged into it by hand, in float32."""
    state = {k: v.float() for k, v in load_file(base / "model.safetensors").items()}
    factors = {k.replace(".default", ""): v.double() for k, v in load_file(adapter / FILE).items()}
    for name in state:
        module = name.removesuffix(".weight")
        scaling = scalings if isinstance(scalings, float) else scalings.get(module, 0.0)
        stem = f"base_model.model.{module}.lora_"
        if f"{stem}A.weight" in factors:
            gained = factors[f"{stem}B.weight"] @ factors[f"{stem}A.weight"]
            state[name] = (state[name] + scaling * gained).float()
        elif f"{stem}embedding_A" in factors:
            gained = factors[f"{stem}embedding_B"] @ factors[f"{stem}embedding_A"]
            state[name] = (state[name] + scaling * gained.T).float()
    path.mkdir(parents=True)
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path
