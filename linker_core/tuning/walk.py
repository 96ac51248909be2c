"""The serving path taken one block at a time, for many plans at once.

The engine's own model and arithmetic, so that what is priced is what will be served; every plan is
a slot. Knows nothing of what is measured.

Legend: T tokens of the text, n rows of a batch, H hidden size, I input or intermediate features,
O output features, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from linker_core.config import MatmulPrecision
from linker_core.engine.arithmetic import Span
from linker_core.engine.devices import activation_dtype, arithmetic_for
from linker_core.engine.kv_cache import KVCache, KVShape
from linker_core.engine.leaf import RoutedLeaf
from linker_core.engine.page_table import PageTable
from linker_core.engine.routed_model import RoutedModel
from linker_core.engine.routing import RoutedLinear
from linker_core.engine.rows import RowMap, StepContext
from linker_core.pace import Pace
from linker_core.tuning.memory import activation_bytes
from linker_core.tuning.storages import Storages
from linker_core.weights.architecture import ModelConfig

_ACTIVATION_BYTES = 24 << 20  # of one batch, if its longest sequence needs no more
_PAGE_TOKENS = 16

# Shown the weight's name, input rows [n, I] and output rows [n, O] of each product of a block.
WatchProduct = Callable[[str, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Pass:
    """One sequence to be computed under one state."""

    state: int
    first: int  # row of its first token in the state
    num_tokens: int


class Walk:
    """A model whose blocks are run one by one.

    Args:
        config: The variant's shape.
        lengths: Tokens of each sequence of the text; states hold them one after the other.
        device: Where everything lies.
        pace: Slows the walk down while others need the machine.
        precision: Of the products; the engine's, for a price of what it serves.
    """

    def __init__(
        self,
        config: ModelConfig,
        lengths: Sequence[int],
        *,
        device: torch.device,
        pace: Pace,
        precision: MatmulPrecision,
    ) -> None:
        self.config = config
        self.device = device
        self.precision: MatmulPrecision = precision
        self.dtype = activation_dtype(device)
        self._pace = pace
        self._context = StepContext(arithmetic_for(device, precision=precision))
        self._model = RoutedModel(config, self._context, device=device, dtype=self.dtype)
        self._leaves: dict[str, RoutedLeaf] = {leaf.leaf_name: leaf for leaf in self._model.leaves}
        self._lengths = tuple(lengths)
        self._max_rows = max(*self._lengths, _ACTIVATION_BYTES // activation_bytes(config))
        self._cache = self._one_layer_cache()

    def stream_norms(self, layer: int) -> tuple[RoutedLeaf, RoutedLeaf]:
        """Returns the norms that read the residual stream before attention and before the MLP."""
        prefix = f"model.layers.{layer}"
        before_mlp = self._leaves.get(f"{prefix}.pre_feedforward_layernorm")  # Gemma 2
        return (
            self._leaves[f"{prefix}.input_layernorm"],
            before_mlp or self._leaves[f"{prefix}.post_attention_layernorm"],
        )

    @contextmanager
    def watching(self, watch: WatchProduct) -> Iterator[None]:
        """Shows `watch` every product of the blocks that run as long as the context lasts.

        The outputs of q, k, v, gate and up are about to be overwritten.
        """
        self._context.watch = watch
        try:
            yield
        finally:
            self._context.watch = None

    def gated(self, gate_nI: torch.Tensor, up_nI: torch.Tensor) -> torch.Tensor:
        """Returns activation(gate) · up [n, I], a new tensor, as the blocks compute it."""
        out_nI = gate_nI.clone(memory_format=torch.contiguous_format)
        self._context.arithmetic.gate(out_nI, up_nI, self.config.hidden_act)
        return out_nI

    def linear_leaves(self, layer: int) -> dict[str, RoutedLinear]:
        """Returns a block's linear leaves by the checkpoint's name of their weight."""
        return {
            f"{name}.weight": leaf
            for name, leaf in self._leaves.items()
            if _in_block(name, layer) and isinstance(leaf, RoutedLinear)
        }

    @torch.inference_mode()
    def embed(self, storages: Storages, token_ids: Sequence[int]) -> torch.Tensor:
        """Returns the first hidden states [T, H] of all sequences."""
        leaf = self._leaves["model.embed_tokens"]
        leaf.bind(0, storages)
        out_TH = torch.empty(
            len(token_ids), self.config.hidden_size, dtype=self.dtype, device=self.device
        )
        for start in range(0, len(token_ids), self._max_rows):
            started = time.monotonic()
            ids = torch.tensor(token_ids[start : start + self._max_rows], device=self.device)
            self._context.body = RowMap([0] * len(ids), device=self.device)
            out_TH[start : start + len(ids)] = self._model.embed(ids)
            self._pace.after_work(time.monotonic() - started)
        leaf.unbind(0)
        return out_TH

    @torch.inference_mode()
    def block(
        self,
        layer: int,
        storages: Sequence[Storages],
        hidden_TH: Sequence[torch.Tensor],
        *,
        watch: Callable[[torch.Tensor], None] | None = None,
    ) -> list[torch.Tensor]:
        """Runs one block; returns the new states [T, H].

        Args:
            layer: Which.
            storages: The block's, of each state to come.
            hidden_TH: The state that each comes from. The same one may serve several; it is
                overwritten by the last of them.
            watch: Shown each batch's rows [n, H] as they leave the block.
        """
        leaves = [leaf for name, leaf in self._leaves.items() if _in_block(name, layer)]
        for slot, stored in enumerate(storages):
            for leaf in leaves:
                leaf.bind(slot, stored)
        last_use = {id(state): slot for slot, state in enumerate(hidden_TH)}
        out = [
            state if last_use[id(state)] == slot else torch.empty_like(state)
            for slot, state in enumerate(hidden_TH)
        ]
        for batch in self._batches(len(storages)):
            started = time.monotonic()
            x_nH = torch.cat([hidden_TH[p.state][p.first : p.first + p.num_tokens] for p in batch])
            self._run(layer, batch, x_nH)
            if watch is not None:
                watch(x_nH)
            row = 0
            for p in batch:
                out[p.state][p.first : p.first + p.num_tokens] = x_nH[row : row + p.num_tokens]
                row += p.num_tokens
            self._pace.after_work(time.monotonic() - started)
        for slot in range(len(storages)):
            for leaf in leaves:
                leaf.unbind(slot)
        return out

    @torch.inference_mode()
    def logits(self, storages: Storages, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Returns the logits [n, V] in float32, a new tensor, of last hidden states."""
        started = time.monotonic()
        leaves = [self._leaves["model.norm"], self._leaves["lm_head"]]
        for leaf in leaves:
            leaf.bind(0, storages)
        rows = RowMap([0] * len(hidden_nH), device=self.device)
        self._context.body = self._context.head = rows
        logits_nV = self._model.logits(self._model.final_norm(hidden_nH)).float()
        for leaf in leaves:
            leaf.unbind(0)
        self._pace.after_work(time.monotonic() - started)
        return logits_nV

    def _run(self, layer: int, batch: Sequence[Pass], x_nH: torch.Tensor) -> None:
        """Runs a block over a batch's rows, in place."""
        self._context.body = RowMap(
            [p.state for p in batch for _ in range(p.num_tokens)], device=self.device
        )
        positions_n = torch.cat([torch.arange(p.num_tokens) for p in batch]).to(self.device)
        self._model.block(
            layer,
            x_nH,
            rotation=self._model.rotation(positions_n, max(p.num_tokens for p in batch)),
            batch=self._context.arithmetic.prepare(self._spans(batch), self._cache),
        )

    def _batches(self, num_states: int) -> Iterator[list[Pass]]:
        """Yields all sequences under all states; those of one sequence stay side by side."""
        batch: list[Pass] = []
        rows = first = 0
        for length in self._lengths:
            for state in range(num_states):
                if batch and rows + length > self._max_rows:
                    yield batch
                    batch, rows = [], 0
                batch.append(Pass(state, first, length))
                rows += length
            first += length
        if batch:
            yield batch

    def _spans(self, batch: Sequence[Pass]) -> list[Span]:
        """Gives each sequence of a batch its pages, from the first page on."""
        spans: list[Span] = []
        page = 0
        for p in batch:
            num_pages = self._cache.pages_for(p.num_tokens)
            table = PageTable(range(page, page + num_pages))
            spans.append(Span(0, p.num_tokens, table))
            page += num_pages
        return spans

    def _one_layer_cache(self) -> KVCache:
        """Returns a cache whose layers are one storage: only one block is computed at a time."""
        # Every sequence may leave its last page almost empty; the shortest has one token.
        num_pages = self._max_rows // _PAGE_TOKENS + self._max_rows // min(self._lengths) + 1
        cache = KVCache(
            KVShape(
                num_pages=num_pages,
                page_tokens=_PAGE_TOKENS,
                num_layers=1,
                num_kv_heads=self.config.num_kv_heads,
                head_dim=self.config.head_dim,
                dtype=self.dtype,
            ),
            device=self.device,
        )
        cache.repeat_layer(self.config.num_layers)
        return cache


def _in_block(leaf_name: str, layer: int) -> bool:
    return leaf_name.startswith(f"model.layers.{layer}.")
