"""The loss along straight lines from variant to base, block by block and whole (BS 3.4 and L).

Legend: A points of a line, S sequences, T tokens of each, H hidden width.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
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
from analysis.tensors import read_tensor
from linker_core.errors import InvalidRequestError
from linker_core.sharing.pieces import comparable
from linker_core.sharing.scan import check_finite
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import parse_key

_log = logging.getLogger(__name__)
NUM_SEQUENCES, NUM_TOKENS, NUM_STEPS = 24, 512, 10  # BS 3.4
ALL_BLOCKS, WHOLE = "all blocks", "whole model"
_NOTES = (
    "W(alpha) = alpha W_base + (1 - alpha) W_variant; ΔL is the loss less that at alpha = 0, in "
    "nats a token. "
    "rise is the largest ΔL (BS calls it barrier), at its alpha, with the standard error over the "
    "sequences; barrier the largest height above the straight line between both ends; lowest "
    "is the least ΔL, end that at alpha = 1.",
    "A block's line leaves all else to the variant; all blocks leaves embedding, final norm and "
    "head to it; whole model moves all tensors of the same shape.",
)


class Line(NamedTuple):
    """One line's losses."""

    name: str
    losses_AS: NDArray[np.float64]

    @property
    def changes(self) -> NDArray[np.float64]:
        """Mean loss less that at alpha = 0."""
        change: NDArray[np.float64] = (self.losses_AS - self.losses_AS[0]).mean(1)
        return change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the text, the points and the blocks."""
    add_sequence_arguments(parser, num_sequences=NUM_SEQUENCES, num_tokens=NUM_TOKENS)
    parser.add_argument(
        "--steps",
        type=int,
        default=NUM_STEPS,
        help=f"from alpha = 0, the variant, to 1, the base (default {NUM_STEPS})",
    )
    add_blocks_argument(parser, default=ALL)


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Walks the lines of every variant."""
    return measure(
        family,
        Excerpt.of(args),
        num_steps=args.steps,
        blocks=args.blocks,
        device=args.device,
    )


def measure(
    family: StudiedFamily,
    text: Excerpt,
    *,
    num_steps: int = NUM_STEPS,
    blocks: str = ALL,
    device: str = CPU,
) -> ProbeResult:
    """Measures the loss along the lines of every variant, one model in memory at a time.

    Args:
        family: Base and variants.
        text: What is read.
        num_steps: Between alpha = 0 and alpha = 1.
        blocks: Whose own lines are walked; see `chosen_blocks`.
        device: Where models are computed.

    Raises:
        InvalidRequestError: A number out of bounds, or a text of no use.
        LinkerError: A checkpoint that cannot be read or does not fit into memory.
    """
    if not 1 <= num_steps <= 1000:
        raise InvalidRequestError(f"--steps is {num_steps}, expected 1 to 1000.", param="steps")
    alphas = np.arange(num_steps + 1) / num_steps
    layers = chosen_blocks(blocks, family.base.config.num_layers)
    rows: list[tuple[Value, ...]] = []
    series: dict[str, Sequence[float]] = {"alpha": alphas.tolist()}
    facts: dict[str, Value] = {}
    ids = text.read_by(family.variants)
    check_finite(family.base)
    for label, variant in family.variants.items():
        model = open_model(variant, device)
        ids_ST = ids[label]
        lines = []
        for line in _lines(model, family.base, ids_ST, alphas, layers):
            _log.info("%s: %s is done", label, line.name)  # a large model takes hours
            lines.append(line)
        rows += [(label, line.name, *_summary(line, alphas)) for line in lines]
        series |= {f"{label}: {line.name}": line.changes.tolist() for line in lines}
        facts |= _facts(label, lines)
    return ProbeResult(
        title="Loss along the line from variant (alpha = 0) to base (alpha = 1)",
        columns=("variant", "line", "rise", "at_alpha", "stderr", "barrier", "lowest", "end"),
        rows=tuple(rows),
        facts=facts,
        notes=(*_NOTES, text.words),
        series=series,
        drawings=tuple(_drawing(label, series) for label in family.variants),
    )


def _drawing(label: str, series: Mapping[str, Sequence[float]]) -> Drawing:
    """Returns a variant's lines."""
    return Drawing(
        caption=f"{label}: change of the loss along each line, from the variant at 0 to the base "
        "at 1; means over sequences. The table has the standard error of each line's rise.",
        shape=Shape.CURVES,
        x_title="alpha",
        y_title="nats per token",
        x=series["alpha"],
        series={
            name.removeprefix(f"{label}: "): values
            for name, values in series.items()
            if name.startswith(f"{label}: ")
        },
    )


def _facts(label: str, lines: Sequence[Line]) -> dict[str, Value]:
    rises = [line.changes.max() for line in lines if line.name not in (ALL_BLOCKS, WHOLE)]
    return {
        f"{label}: loss": float(lines[-1].losses_AS[0].mean()),
        f"{label}: largest rise of a block": float(max(rises)),
        f"{label}: median rise of a block": float(np.median(rises)),
        f"{label}: sequences": lines[-1].losses_AS.shape[1],
    }


def _lines(
    model: StudyModel,
    base: Checkpoint,
    ids_ST: torch.Tensor,
    alphas: NDArray[np.float64],
    layers: Iterable[int],
) -> Iterator[Line]:
    """Yields the lines of blocks, of all blocks, and of the whole model, which ends as it began."""
    asked = set(layers)
    ids = torch.split(ids_ST, 1)
    walk = LayerWalk(model, ids_ST.shape[1])
    layer_of = _movable(model, base)
    # The layers before a changed block are the variant's at every alpha: they run once.
    inputs = embedded = [walk.embed(sequence) for sequence in ids]
    for layer in range(walk.num_layers):
        if layer in asked:
            names = [name for name, found in layer_of.items() if found == layer]
            losses_AS = _along(
                model, base, names, alphas, partial(_losses, walk, ids, layer, inputs)
            )
            yield Line(f"block {layer}", losses_AS)
        inputs = [walk.layer(layer, hidden) for hidden in inputs]
    names = [name for name, found in layer_of.items() if found is not None]
    whole = partial(_losses, walk, ids, 0)
    yield Line(ALL_BLOCKS, _along(model, base, names, alphas, partial(whole, embedded)))
    yield Line(WHOLE, _along(model, base, list(layer_of), alphas, partial(whole, None)))


def _movable(model: StudyModel, base: Checkpoint) -> dict[str, int | None]:
    """Returns tensor -> layer of all tensors that both have in one shape."""
    found: dict[str, int | None] = {}
    for name in model.names:
        if comparable(base, model.checkpoint, name):
            key = parse_key(name)
            assert key is not None
            found[name] = key.layer
    return found


def _along(
    model: StudyModel,
    base: Checkpoint,
    names: Sequence[str],
    alphas: NDArray[np.float64],
    losses: Callable[[], list[float]],
) -> NDArray[np.float64]:
    """Returns each sequence's loss at every point, [A, S]; the model is left as it was."""
    found = []
    for alpha in alphas.astype(np.float32):
        for name in names:  # a tensor of each model in memory, whatever the line
            values = (1 - alpha) * read_tensor(model.checkpoint, name)
            model.put(name, values + alpha * read_tensor(base, name))
        found.append(losses())
    model.restore(names)
    return np.array(found)


def _losses(
    walk: LayerWalk,
    ids: Sequence[torch.Tensor],
    first_layer: int,
    inputs: Sequence[torch.Tensor] | None,
) -> list[float]:
    """Returns each sequence's loss from its input to a layer on; None: from its tokens on."""
    losses = []
    for number, sequence in enumerate(ids):
        hidden = walk.embed(sequence) if inputs is None else inputs[number]
        for layer in range(first_layer, walk.num_layers):
            hidden = walk.layer(layer, hidden)
        losses.append(walk.loss(hidden, sequence))
    return losses


def _summary(line: Line, alphas: NDArray[np.float64]) -> tuple[Value, ...]:
    """Returns rise, its alpha and standard error, barrier, lowest and end of a line."""
    change_A = line.changes
    top = int(change_A.argmax())
    change_S = line.losses_AS[top] - line.losses_AS[0]
    stderr = float(change_S.std(ddof=1)) / math.sqrt(change_S.size) if change_S.size > 1 else None
    barrier = float((change_A - alphas * change_A[-1]).max())
    lowest, end = float(change_A.min()), float(change_A[-1])
    return float(change_A[top]), float(alphas[top]), stderr, barrier, lowest, end
