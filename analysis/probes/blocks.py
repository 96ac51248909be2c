"""One decoder layer's tensors as float32 arrays, how far two of them are, and which were asked for.

Legend: O output width, I input width of a product.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.tensors import read_tensor
from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.sharing.similarity import PairSums
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import block_name, parse_key

Block = Mapping[str, NDArray[np.float32]]  # parameter -> values, shapes as stored
ALL, MIDDLE = "all", "middle"
_CHUNK = 1 << 20  # elements turned into float64 at a time


class Part(NamedTuple):
    """Some of a block's parameters, by how their names begin and end."""

    label: str
    prefix: str
    suffix: str = ""

    def names(self, block: Block) -> list[str]:
        """Returns the part's parameters in a block."""
        return [
            name for name in block if name.startswith(self.prefix) and name.endswith(self.suffix)
        ]


ATTENTION, MLP = Part("self_attn", "self_attn."), Part("mlp", "mlp.")
PROJECTIONS = Part("self_attn projections", "self_attn.", "_proj.weight")  # no biases, no norms


class Distance(NamedTuple):
    """How far two groups of tensors are: means over the tensors."""

    cos: float  # BS Eq. 1
    epsilon: float  # BS Eq. 2
    symmetric: float  # |A - B| / (|A| + |B|), what BS table 3 prints


def read_finite(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """Returns a tensor's values in its stored shape.

    Raises:
        BadCheckpointError: NaN or infinite weights, or a file that changed.
    """
    values = read_tensor(checkpoint, name)
    if not np.isfinite(values).all():
        file = checkpoint.shard_names[checkpoint.tensors[name].shard]
        raise BadCheckpointError(
            f"{checkpoint.path}: {file}: tensor {name} has NaN or infinite weights. The training "
            "run that wrote it diverged; export an earlier step."
        )
    return values


def read_block(checkpoint: Checkpoint, layer: int) -> dict[str, NDArray[np.float32]]:
    """Returns a layer's parameters by their names within the block.

    Raises:
        BadCheckpointError: NaN or infinite weights, or a file that changed.
    """
    keys = {name: parse_key(name) for name in checkpoint.tensors}
    parameters = [key.parameter for key in keys.values() if key is not None and key.layer == layer]
    return {name: read_finite(checkpoint, block_name(layer, name)) for name in parameters}


def pair_sums(a: NDArray[np.float32], b: NDArray[np.float32]) -> PairSums:
    """Returns the sums of a pair of arrays of one shape, accumulated in float64."""
    left, right = a.ravel(), b.ravel()
    sums: list[tuple[float, float, float, float]] = []
    for start in range(0, left.size, _CHUNK):
        x = left[start : start + _CHUNK].astype(np.float64)
        y = right[start : start + _CHUNK].astype(np.float64)
        delta = x - y
        sums.append((float(x @ y), float(x @ x), float(y @ y), float(delta @ delta)))
    dot, a_square, b_square, delta_square = map(math.fsum, zip(*sums, strict=True))
    return PairSums(
        dot=dot,
        donor_square=a_square,
        variant_square=b_square,
        delta_square=delta_square,
        identical=delta_square == 0.0,
        count=left.size,
    )


def symmetric_epsilon(sums: PairSums) -> float:
    """Returns |A - B| / (|A| + |B|); 0 where both are zero."""
    norms = math.sqrt(sums.donor_square) + math.sqrt(sums.variant_square)
    return math.sqrt(sums.delta_square) / norms if norms else 0.0


def distance(base: Block, variant: Block, part: Part) -> Distance:
    """Returns the means over the parameters of a part."""
    pairs = [pair_sums(base[name], variant[name]) for name in part.names(base)]
    return Distance(
        cos=fmean(pair.cos for pair in pairs),
        epsilon=fmean(pair.epsilon for pair in pairs),
        symmetric=fmean(map(symmetric_epsilon, pairs)),
    )


def add_blocks_argument(parser: argparse.ArgumentParser, *, default: str = MIDDLE) -> None:
    """Declares `--blocks`."""
    parser.add_argument(
        "--blocks",
        metavar="I,J…",
        default=default,
        help=f"layers to look at, counted from 0, or {ALL}, or {MIDDLE} (default {default})",
    )


def chosen_blocks(stated: str, num_layers: int) -> Sequence[int]:
    """Returns the layers that `--blocks` names.

    Raises:
        InvalidRequestError: No number, or no layer of the model.
    """
    if stated == MIDDLE:
        return (num_layers // 2,)
    if stated == ALL:
        return range(num_layers)
    words = [word.strip() for word in stated.split(",")]
    if not all(word.isdecimal() and int(word) < num_layers for word in words):
        raise InvalidRequestError(
            f"--blocks is {stated!r:.60}, expected {ALL}, {MIDDLE}, or numbers from 0 to "
            f"{num_layers - 1} with commas between.",
            param="blocks",
        )
    return tuple(map(int, words))
