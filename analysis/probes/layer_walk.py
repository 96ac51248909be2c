"""A model's layers one at a time, so that what comes before a changed block is computed once.

Legend: T tokens of a sequence, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from analysis.model import StudyModel

_HEAD_ROWS = 256  # logits of a whole sequence over a large vocabulary take gigabytes


class LayerWalk:
    """Runs single layers of a model on sequences of one length, each by itself.

    The layers are the model's own: weights that are put there later are the ones that run.

    Args:
        model: Stays the caller's.
        num_tokens: T of every sequence.
    """

    def __init__(self, model: StudyModel, num_tokens: int) -> None:
        self._model = model
        body = model.module.get_submodule("model")
        self._embedding = body.get_submodule("embed_tokens")
        self._norm = body.get_submodule("norm")
        layers = body.get_submodule("layers")
        self._layers: tuple[nn.Module, ...] = tuple(layers.children())
        self._settings = self._capture(num_tokens)

    @property
    def num_layers(self) -> int:
        """How many there are."""
        return len(self._layers)

    @torch.no_grad()
    def embed(self, ids_1T: torch.Tensor) -> torch.Tensor:
        """Returns what the first layer reads, [1, T, H]."""
        hidden: torch.Tensor = self._embedding(ids_1T.to(self._model.device))
        return hidden

    @torch.no_grad()
    def layer(self, index: int, hidden_1TH: torch.Tensor) -> torch.Tensor:
        """Returns what a layer makes of its input."""
        out = self._layers[index](hidden_1TH, **self._settings[index])
        assert isinstance(out, torch.Tensor)
        return out

    @torch.no_grad()
    def loss(self, hidden_1TH: torch.Tensor, ids_1T: torch.Tensor) -> float:
        """Returns the mean loss of predicting tokens 1 … T-1 from the last layer's output, nats."""
        rows_nH = self._norm(hidden_1TH)[0, :-1]
        targets = ids_1T[0, 1:].to(self._model.device)
        losses = [
            nn.functional.cross_entropy(self._model.logits(rows), wanted, reduction="sum")
            for rows, wanted in zip(
                torch.split(rows_nH, _HEAD_ROWS), torch.split(targets, _HEAD_ROWS), strict=True
            )
        ]
        return float(torch.stack(losses).double().sum()) / len(targets)

    def _capture(self, num_tokens: int) -> list[dict[str, Any]]:
        """Returns what the model passes to each layer besides its input: masks and positions."""
        settings: list[dict[str, Any]] = []

        def keep(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            settings.append(kwargs)

        handles = [
            layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self._layers
        ]
        try:
            with torch.no_grad():
                self._model.hidden(torch.zeros(1, num_tokens, dtype=torch.long))
        finally:
            for handle in handles:
                handle.remove()
        return settings
