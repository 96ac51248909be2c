"""What each rung of a block's weights does to their products, on a sample of a text's rows.

Legend: n rows of the sample, I input features, O output features, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import nn

from linker_core.sharing.rungs import AnyRung
from linker_core.tuning.row_errors import RowErrors
from linker_core.tuning.storages import SectionReader
from linker_core.tuning.walk import Walk

RungErrors = dict[tuple[str, AnyRung], float]  # by matrix and rung

_SUBLAYERS = ("self_attn", "mlp")  # in the order in which they write into the residual stream
_PICKED_OUTPUTS = 128  # of a product, at least, that tell its error


class _Sample:
    """Rows of one of the variant's own products."""

    def __init__(self) -> None:
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []

    def keep(self, x_nI: torch.Tensor, y_nO: torch.Tensor) -> None:
        """Takes rows in; what they lie in may be overwritten."""
        self._inputs.append(x_nI.clone())
        self._outputs.append(y_nO.clone())

    @property
    def inputs(self) -> torch.Tensor:
        return torch.cat(self._inputs)

    @property
    def outputs(self) -> torch.Tensor:
        return torch.cat(self._outputs)


class BlockProbe:
    """Listens to a block while it runs, and compares its rungs afterwards.

    Args:
        walk: Whose operations are used.
        reader: Of the pair.
        layer: The block.
        stride: One in so many rows belongs to the sample.
    """

    def __init__(self, walk: Walk, reader: SectionReader, layer: int, stride: int) -> None:
        self._walk, self._reader, self._stride = walk, reader, stride
        self._norms = walk.stream_norms(layer)
        self._samples = {name: _Sample() for name in walk.linear_leaves(layer)}
        self._written = dict.fromkeys(_SUBLAYERS, 0.0)  # Σ |what it adds|² / |stream after it|²
        self._num_rows = 0
        # Of the batch that runs: the stream before each sublayer.
        self._streams_nH: list[torch.Tensor] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listens to the leaves for as long as the context lasts."""
        with ExitStack() as stack:
            stack.enter_context(self._walk.watching(self._keep))
            for norm in self._norms:
                handle = norm.register_forward_hook(self._note_stream)
                stack.callback(handle.remove)
            yield

    def watch(self, h_nH: torch.Tensor) -> None:
        """Sees a batch's rows when the block has written into them."""
        streams = [*self._streams_nH, h_nH]
        for sublayer, (before, after) in zip(_SUBLAYERS, pairwise(streams), strict=True):
            self._written[sublayer] += float(
                relative(squares(after - before), squares(after)).sum()
            )
        self._streams_nH.clear()
        self._num_rows += len(h_nH)

    def errors(self) -> RungErrors:
        """Returns the block's, once it has run over the whole text; lets go of the samples."""
        found: RungErrors = {}
        for name in self._samples:
            if offered := self._reader.offered(name):
                share = self._written[name.split(".")[3]] / self._num_rows
                for rung, relative in self._relative_errors(name, offered):
                    found[name, rung] = relative * share
        self._samples.clear()
        return found

    def _relative_errors(
        self, name: str, offered: Sequence[AnyRung]
    ) -> Iterator[tuple[AnyRung, float]]:
        """Yields each rung's error, where it goes on from, relative to what goes on."""
        x_nI, y_nO = self._samples[name].inputs.float(), self._samples[name].outputs
        picked = torch.arange(0, y_nO.shape[1], max(1, y_nO.shape[1] // _PICKED_OUTPUTS))
        errors = RowErrors(self._reader, name, picked.to(y_nO.device))
        partner_nO = self._partner(name)
        whole_nO = y_nO if partner_nO is None else self._gated(name, y_nO, partner_nO)
        whole_n = squares(whole_nO)
        for rung in offered:
            part_nO = (x_nI @ errors.of(rung).T).to(y_nO.dtype)
            if partner_nO is not None:
                own_nO = y_nO[:, picked]
                part_nO = self._gated(name, own_nO + part_nO, partner_nO[:, picked])
                part_nO -= whole_nO[:, picked]
            ratio = float(relative(squares(part_nO), whole_n).mean())
            yield rung, ratio * y_nO.shape[1] / len(picked)

    def _partner(self, name: str) -> torch.Tensor | None:
        """Returns what up makes for gate, what gate makes for up: only their product goes on."""
        for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
            if one in name:
                return self._samples[name.replace(one, other)].outputs
        return None

    def _gated(self, name: str, y_nO: torch.Tensor, partner_nO: torch.Tensor) -> torch.Tensor:
        return self._walk.gated(*((y_nO, partner_nO) if "gate" in name else (partner_nO, y_nO)))

    def _keep(self, name: str, x_nI: torch.Tensor, y_nO: torch.Tensor) -> None:
        sampled = slice(-self._num_rows % self._stride, None, self._stride)
        self._samples[name].keep(x_nI[sampled], y_nO[sampled])

    def _note_stream(
        self, _norm: nn.Module, inputs: tuple[torch.Tensor], _output: torch.Tensor
    ) -> None:
        self._streams_nH.append(inputs[0].clone())  # the block writes into it


def squares(x_nO: torch.Tensor) -> torch.Tensor:
    """Returns |x|² of each row in float32."""
    found_n: torch.Tensor = torch.linalg.vector_norm(x_nO, dim=-1, dtype=torch.float32).square_()
    return found_n


def relative(part_n: torch.Tensor, whole_n: torch.Tensor) -> torch.Tensor:
    """Returns part / whole; nothing of nothing is 0."""
    return part_n / whole_n.clamp(min=torch.finfo(torch.float32).tiny)
