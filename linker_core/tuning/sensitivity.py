"""Ranks sub-parameters by the error their swap causes on the variant's own hidden states.

One forward pass of the variant; beside every product stands the donor's on the same inputs. A guide
for choosing candidates, never a price.

Legend: n rows of a batch, I input features, O output features, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from linker_core.sharing.rungs import Rung
from linker_core.tuning.memory import LOGITS_CHUNK_BYTES
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.walk import Walk
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME

_SUBLAYERS = ("self_attn", "mlp")  # in the order in which they write into the residual stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What swapping one weight for the donor's does, relative to the residual stream."""

    name: str
    error: float  # of the residual stream that the swap can change, |δ|² / |h|²; about nats


@torch.inference_mode()
def measure_sensitivities(
    walk: Walk, reader: SectionReader, own: Rungs, token_ids: Sequence[int]
) -> list[Sensitivity]:
    """Runs the variant once and measures every weight that could alias, norms and biases apart.

    Embedding and head are measured too; a head's error is the KL itself. Any other weight is
    charged its relative output error times the share of the residual stream that its
    sublayer writes, since that is what the error can become.

    Args:
        walk: Over the same text.
        reader: Of the pair.
        own: The rungs of the unshared variant.
        token_ids: All sequences, one after the other.
    """
    hidden_TH, embedding_error = _embedded(walk, reader, own, token_ids)
    found: list[Sensitivity] = []
    for layer in range(walk.config.num_layers):
        swapped = {
            name: reader.storage(name, Rung.ALIAS).tensor
            for name in walk.linear_leaves(layer)
            if _swappable(reader, own, name)
        }
        probe = _BlockProbe(walk, layer, swapped)
        with probe.attached():
            (hidden_TH,) = walk.block(
                layer, [reader.storages(layer, own)], [hidden_TH], watch=probe.watch
            )
        found += probe.sensitivities()
        reader.forget(layer)
    errors = _head_error(walk, reader, own, hidden_TH)
    reader.forget(None)  # only now: what is outside the blocks is read once for both its ends
    for name, error in embedding_error.items():
        errors[name] = errors.get(name, 0.0) + error  # a tied embedding is swapped in both places
    return [*found, *(Sensitivity(name=name, error=error) for name, error in errors.items())]


def _embedded(
    walk: Walk, reader: SectionReader, own: Rungs, token_ids: Sequence[int]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the first hidden states [T, H], and what swapping the embedding does to them."""
    own_TH = walk.embed(reader.storages(None, own), token_ids)
    errors = {}
    if _swappable(reader, own, EMBED_NAME):
        swapped = reader.storages(None, {**own, EMBED_NAME: Rung.ALIAS})
        error_T = _relative(walk.embed(swapped, token_ids) - own_TH, own_TH)
        errors[EMBED_NAME] = float(error_T.mean())
    return own_TH, errors


def _head_error(
    walk: Walk, reader: SectionReader, own: Rungs, hidden_TH: torch.Tensor
) -> dict[str, float]:
    """Returns the mean KL, nats, that swapping the head causes; empty if it cannot be."""
    names = [name for name in reader.names(None) if name in (EMBED_NAME, LM_HEAD_NAME)]
    name = LM_HEAD_NAME if LM_HEAD_NAME in names else EMBED_NAME
    if not _swappable(reader, own, name):
        return {}
    sides = [reader.storages(None, own), reader.storages(None, {**own, name: Rung.ALIAS})]
    total = 0.0
    chunk = max(1, LOGITS_CHUNK_BYTES // (4 * walk.config.vocab_size))
    for start in range(0, len(hidden_TH), chunk):
        own_nV, swapped_nV = (
            torch.log_softmax(walk.logits(side, hidden_TH[start : start + chunk]), dim=-1)
            for side in sides
        )
        gain_nV = torch.sub(own_nV, swapped_nV, out=swapped_nV)
        # Rounding can leave a tiny negative sum where both are equal.
        total += float(own_nV.exp_().mul_(gain_nV).sum(dim=-1).clamp_min_(0).sum())
    return {name: total / len(hidden_TH)}


def _swappable(reader: SectionReader, own: Rungs, name: str) -> bool:
    return reader.effective(name, own[name]) is not Rung.ALIAS and reader.can_alias(name)


class _BlockProbe:
    """Compares each leaf's output with the donor's while a block runs.

    Args:
        walk: Whose products are used.
        layer: The block.
        swapped: The donor's weights [O, I] by name.
    """

    def __init__(self, walk: Walk, layer: int, swapped: Mapping[str, torch.Tensor]) -> None:
        self._walk = walk
        self._leaves = walk.linear_leaves(layer)
        self._norms = walk.stream_norms(layer)
        self._swapped = swapped
        self._relative = dict.fromkeys(swapped, 0.0)  # Σ |δ|² / |y|²
        self._written = dict.fromkeys(_SUBLAYERS, 0.0)  # Σ |what it adds|² / |stream after it|²
        self._num_rows = 0
        # Of the batch that runs: the stream before each sublayer, and the gate's two outputs.
        self._streams_nH: list[torch.Tensor] = []
        self._gate: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listens to the leaves for as long as the context lasts."""
        with ExitStack() as stack:
            stack.enter_context(self._walk.watching(self._compare))
            for norm in self._norms:
                handle = norm.register_forward_hook(self._note_stream)
                stack.callback(handle.remove)
            yield

    def watch(self, h_nH: torch.Tensor) -> None:
        """Sees a batch's rows when the block has written into them."""
        streams = [*self._streams_nH, h_nH]
        for sublayer, (before, after) in zip(_SUBLAYERS, pairwise(streams), strict=True):
            self._written[sublayer] += float(_relative(after - before, after).sum())
        self._streams_nH.clear()
        self._num_rows += len(h_nH)

    def sensitivities(self) -> list[Sensitivity]:
        """Returns the block's, once it has run over the whole text."""
        return [
            Sensitivity(
                name=name, error=relative * self._written[name.split(".")[3]] / self._num_rows**2
            )
            for name, relative in self._relative.items()
        ]

    def _note_stream(
        self, _norm: nn.Module, inputs: tuple[torch.Tensor], _output: torch.Tensor
    ) -> None:
        self._streams_nH.append(inputs[0].clone())  # the block writes into it

    def _compare(self, name: str, x_nI: torch.Tensor, y_nO: torch.Tensor) -> None:
        swapped_nO = None
        if name in self._swapped:
            bias = self._leaves[name].stored[0].get("bias")
            bias_O = None if bias is None else bias.tensor
            swapped_nO = self._walk.product(x_nI, self._swapped[name], bias_O)
        if name.endswith(".gate_proj.weight"):
            self._gate = y_nO, swapped_nO
        elif name.endswith(".up_proj.weight"):
            self._compare_gated(name, y_nO, swapped_nO)
        elif swapped_nO is not None:
            self._add(name, swapped_nO, y_nO)

    def _compare_gated(
        self, name: str, up_nI: torch.Tensor, swapped_up_nI: torch.Tensor | None
    ) -> None:
        """Carries the errors of gate and up to their product, which alone goes on."""
        assert self._gate is not None
        gate_nI, swapped_gate_nI = self._gate
        gated_nI = self._walk.gated(gate_nI, up_nI)
        if swapped_gate_nI is not None:
            gate = name.replace("up_proj", "gate_proj")
            self._add(gate, self._walk.gated(swapped_gate_nI, up_nI), gated_nI)
        if swapped_up_nI is not None:
            self._add(name, self._walk.gated(gate_nI, swapped_up_nI), gated_nI)
        self._gate = None

    def _add(self, name: str, swapped_nO: torch.Tensor, own_nO: torch.Tensor) -> None:
        """Takes an error in; overwrites what was swapped."""
        self._relative[name] += float(_relative(swapped_nO.sub_(own_nO), own_nO).sum())


def _relative(part_nO: torch.Tensor, whole_nO: torch.Tensor) -> torch.Tensor:
    """Returns |part|² / |whole|² of each row in float32; nothing of nothing is 0."""
    part_n, whole_n = (
        torch.linalg.vector_norm(x_nO, dim=-1, dtype=torch.float32).square_()
        for x_nO in (part_nO, whole_nO)
    )
    ratio_n: torch.Tensor = part_n / whole_n.clamp_min_(torch.finfo(torch.float32).tiny)
    return ratio_n
