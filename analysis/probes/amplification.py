"""How the error of aliased blocks grows from layer to layer (BS H, figure 6).

alpha(i) = mean over tokens of (|δ_{i+1}| / |h_{i+1}|) / (|δ_i| / |h_i|), where h_i is what layer i
reads in the variant and δ_i what it reads in the variant with the base's blocks, less h_i.

Legend: T tokens of a sequence, H hidden width, n tokens of all sequences.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.drawing import Drawing, Shape
from analysis.family import StudiedFamily
from analysis.model import StudyModel
from analysis.probes.blocks import ALL, add_blocks_argument, chosen_blocks
from analysis.probes.devices import CPU, open_model
from analysis.probes.layer_walk import LayerWalk
from analysis.probes.result import ProbeResult, Value
from analysis.probes.sequences import Excerpt, add_sequence_arguments
from linker_core.sharing.scan import check_finite
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import parse_key

NUM_SEQUENCES, NUM_TOKENS = 100, 128  # BS H: 100 inputs, of a length that it does not state
Hidden = list[torch.Tensor]  # [1, T, H] a sequence


class Growth(NamedTuple):
    """What an error does in one layer; nothing is said of a layer that no error comes into."""

    layer: int
    error: float  # behind it, mean over tokens
    alpha: float | None = None  # growth within it, mean over tokens
    alpha_median: float | None = None
    alpha_p5: float | None = None
    alpha_p95: float | None = None

    @property
    def middle(self) -> tuple[float, float] | None:
        """The middle 90 % of the tokens."""
        if self.alpha_p5 is None or self.alpha_p95 is None:
            return None
        return self.alpha_p5, self.alpha_p95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the text and the blocks that are aliased."""
    add_sequence_arguments(parser, num_sequences=NUM_SEQUENCES, num_tokens=NUM_TOKENS)
    add_blocks_argument(parser, default=ALL)


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Follows the error through every variant."""
    return measure(family, Excerpt.of(args), blocks=args.blocks, device=args.device)


def measure(
    family: StudiedFamily, text: Excerpt, *, blocks: str = ALL, device: str = CPU
) -> ProbeResult:
    """Follows the error through the layers of every variant, one model in memory at a time.

    Args:
        family: Base and variants.
        text: What is read.
        blocks: Which are the base's; see `chosen_blocks`.
        device: Where models are computed.

    Raises:
        InvalidRequestError: A number out of bounds, or a text of no use.
        LinkerError: A checkpoint that cannot be read or does not fit into memory.
    """
    aliased = chosen_blocks(blocks, family.base.config.num_layers)
    growth: dict[str, list[Growth]] = {}
    facts: dict[str, Value] = {}
    ids = text.read_by(family.variants)
    check_finite(family.base)
    for label, variant in family.variants.items():
        model = open_model(variant, device)
        ids_ST = ids[label]
        errors = relative_errors(model, family.base, ids_ST, aliased)
        growth[label] = _growth(errors)
        facts[f"{label}: sequences"] = len(ids_ST)
        facts[f"{label}: error at the end"] = float(errors[-1].mean())
    return ProbeResult(
        title="Growth of the error of aliased blocks",
        columns=("variant", *Growth._fields),
        rows=tuple((label, *one) for label, found in growth.items() for one in found),
        facts=facts,
        notes=(
            "error is the mean over tokens of |δ|/|h| behind the layer; alpha its growth within "
            "the layer, mean, median and the middle 90 % over tokens. Before the first aliased "
            "block there is no error, so that block has no alpha: embeddings are the variant's.",
            "Growth below 1 a layer damps, above 1 amplifies. BS: 0.7 to 2.2 inside, with spikes "
            f"at both ends. {text.words}",
        ),
        drawings=(_drawing(growth),),
    )


def _drawing(growth: Mapping[str, Sequence[Growth]]) -> Drawing:
    """Returns every variant's growth over the layers."""
    return Drawing(
        caption="Growth of the relative error within each layer: means over tokens, and the "
        "middle 90 % of the tokens. Above 1 an error grows.",
        shape=Shape.CURVES,
        x_title="layer",
        y_title="alpha",
        x=[one.layer for one in next(iter(growth.values()))],
        series={label: [one.alpha for one in found] for label, found in growth.items()},
        intervals={label: [one.middle for one in found] for label, found in growth.items()},
    )


@torch.no_grad()
def relative_errors(
    model: StudyModel, base: Checkpoint, ids_ST: torch.Tensor, aliased: Container[int]
) -> list[NDArray[np.float64]]:
    """Returns |δ|/|h| of every token [n], before the first layer and behind each.

    Both streams run layer by layer side by side, so there is one model in memory; it ends as it
    began.

    Args:
        model: The variant.
        base: Whose blocks are aliased.
        ids_ST: Sequences.
        aliased: Layers that the second stream computes with the base's weights.
    """
    walk = LayerWalk(model, ids_ST.shape[1])
    own: Hidden = [walk.embed(sequence) for sequence in torch.split(ids_ST, 1)]
    shared: Hidden = list(own)
    errors = [_relative(own, shared)]
    for layer in range(walk.num_layers):
        own_next = [walk.layer(layer, hidden) for hidden in own]
        if layer in aliased:
            names = [name for name in model.names if _layer_of(name) == layer]
            model.adopt(base, names)
            shared = [walk.layer(layer, hidden) for hidden in shared]
            model.restore(names)
        else:
            shared = [walk.layer(layer, hidden) for hidden in shared]
        own = own_next
        errors.append(_relative(own, shared))
    return errors


def _relative(own: Hidden, shared: Hidden) -> NDArray[np.float64]:
    ratios = [
        (b - a).double().norm(dim=-1) / a.double().norm(dim=-1)
        for a, b in zip(own, shared, strict=True)
    ]
    found: NDArray[np.float64] = torch.cat(ratios, dim=1)[0].cpu().numpy()
    return found


def _growth(errors: Sequence[NDArray[np.float64]]) -> list[Growth]:
    """Returns what an error does in each layer."""
    found: list[Growth] = []
    for layer in range(len(errors) - 1):
        before_n, after_n = errors[layer], errors[layer + 1]
        moved = before_n > 0.0
        error = float(after_n.mean())
        if not moved.any():
            found.append(Growth(layer, error))
            continue
        growth_n = after_n[moved] / before_n[moved]
        low, median, high = (float(value) for value in np.percentile(growth_n, (5, 50, 95)))
        found.append(Growth(layer, error, float(growth_n.mean()), median, low, high))
    return found


def _layer_of(name: str) -> int | None:
    key = parse_key(name)
    assert key is not None
    return key.layer
