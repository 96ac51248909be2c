"""Families built by hand: tests say by name who aliases what, and transformers is the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from linker_core.engine.arithmetic import Arithmetic
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.devices import arithmetic_for
from linker_core.engine.kv_cache import KVCache, KVShape
from linker_core.engine.runner import Runner
from linker_core.engine.torch_arithmetic import TorchArithmetic
from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.stored import Stored, StoredResidual, StoredRows, StoredTensor
from linker_core.sharing.rungs import Residual
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME

CPU = torch.device("cpu")
ARITHMETICS: tuple[type[Arithmetic], ...] = (CompiledArithmetic, TorchArithmetic)
Storages = Mapping[str, Stored]


def everything(_: str) -> bool:
    return True


def nothing(_: str) -> bool:
    return False


def no_residual(_: str) -> Residual | None:
    return None


def stored_tensors(
    path: Path,
    *,
    donor: Storages | None = None,
    aliased: Callable[[str], bool] = nothing,
    by_rows: Callable[[str], bool] = nothing,
    coded: Callable[[str], Residual | None] = no_residual,
) -> dict[str, Stored]:
    """The checkpoint's tensors, those that `aliased` names being the donor's own objects.

    Of those that `by_rows` names only the rows are held that are not the donor's, and of a matrix
    only the delta, where `coded` says how.
    """
    state = load_file(path / "model.safetensors")
    stored: dict[str, Stored] = {}
    for name, tensor in state.items():
        stored[name] = StoredTensor(tensor=tensor)
        if donor is not None and aliased(name):
            stored[name] = donor[name]
        elif donor is not None and by_rows(name):
            stored[name] = split_table(donor[name].base, tensor)
        elif donor is not None and tensor.dim() == 2 and (rung := coded(name)) is not None:
            stored[name] = DeltaEncoder(donor[name].base, tensor).encode(rung)
    if LM_HEAD_NAME not in stored:
        stored[LM_HEAD_NAME] = stored[EMBED_NAME]
    return stored


def split_table(base: StoredTensor, table: torch.Tensor) -> StoredRows:
    """A table held as the rows that are not `base`'s, found one by one."""
    lent = base.tensor
    own = [
        row
        for row in range(len(table))
        if row >= len(lent) or not torch.equal(table[row], lent[row])
    ]
    positions = torch.tensor(own, dtype=torch.int64)
    return StoredRows(base=base, own=table[positions], positions=positions, num_rows=len(table))


def dense(entry: Stored) -> torch.Tensor:
    """The tensor that a separate copy would hold."""
    if isinstance(entry, StoredTensor):
        return entry.tensor
    if isinstance(entry, StoredResidual):
        coded = entry.num_rows - len(entry.extra)
        whole = entry.base.tensor[:coded].float() + entry.delta()
        return torch.cat([whole, entry.extra.float()])
    table = entry.own.new_zeros(entry.num_rows, entry.own.shape[1])
    lent = entry.base.tensor[: entry.num_rows]
    table[: len(lent)] = lent
    table[entry.positions] = entry.own
    return table


def kv_shape(config: ModelConfig, *, num_pages: int = 64, page_tokens: int = 4) -> KVShape:
    return KVShape(
        num_pages=num_pages,
        page_tokens=page_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
    )


@dataclass
class Family:
    """A runner with its variants' storages by slot."""

    runner: Runner
    cache: KVCache
    stored: list[Storages] = field(default_factory=list)

    def add(self, stored: Storages) -> int:
        slot = len(self.stored)
        self.stored.append(stored)
        self.runner.bind(slot, stored)
        return slot


def build_family(
    path: Path, *, num_pages: int = 64, arithmetic: Arithmetic | None = None
) -> Family:
    """A family whose slot 0 is the donor at `path`."""
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config
    cache = KVCache(kv_shape(config, num_pages=num_pages), device=CPU)
    runner = Runner(config, cache, arithmetic or arithmetic_for(CPU), device=CPU)
    family = Family(runner, cache)
    family.add(stored_tensors(path))
    return family


def reference_model(
    path: Path, *, stored: Storages | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Plain transformers with eager attention; `stored` replaces the checkpoint's weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    )
    if stored is not None:
        state = {name: dense(entry).to(dtype) for name, entry in stored.items()}
        model.load_state_dict(state)
        model.tie_weights()
    model.train(False)
    return model


def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one sequence, computed whole."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits
    return logits[0]


def reference_greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation, each step computed whole."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def reference_logprobs(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> list[float]:
    """Log-probability of each token of a continuation."""
    logits = reference_logits(model, [*prompt, *tokens])[len(prompt) - 1 : -1]
    chosen = torch.log_softmax(logits, dim=-1)[torch.arange(len(tokens)), tokens]
    return [float(value) for value in chosen]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())
