"""A control of BS 3.3: another point of the same function, and what the metrics make of it.

A symmetry changes a variant's block and not what it computes. Cosine and ε to the base are taken
before and after: where they change, they measure more than the function.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.probes.block_function import NUM_TOKENS, BlockFunction
from analysis.probes.blocks import (
    MIDDLE,
    Block,
    Part,
    add_blocks_argument,
    chosen_blocks,
    distance,
    read_block,
)
from analysis.probes.result import ProbeResult, Value
from analysis.seed import check_seed
from linker_core.weights.architecture import ModelConfig

Symmetry = Callable[[Block, ModelConfig, np.random.Generator], dict[str, NDArray[np.float32]]]
COLUMNS = (
    "variant", "block", "part", "weights", "cos", "epsilon", "symmetric", "max_change",
    "relative_change",
)  # fmt: skip
ORIGINAL, MOVED = "original", "moved"
_NOTES = (
    "cos is BS Eq. 1 and epsilon BS Eq. 2, both to the base and as means over the part's tensors, "
    'biases included, save in "projections" (the weights of q, k, v and o alone, as in a family '
    "without biases); symmetric is |A-B|/(|A|+|B|), which BS table 3 prints under the name ε.",
    f"max_change is the largest difference between the outputs of the variant's block before and "
    f"after, for {NUM_TOKENS} random tokens in float32; relative_change is that over the largest "
    "output.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what every control takes."""
    add_blocks_argument(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the random symmetry (default 0)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A symmetry, and what of a block it is looked at in."""

    symmetry: Symmetry  # takes a block to an equivalent one
    title: str  # of the result
    parts: Sequence[Part]  # a row each before and after
    notes: Sequence[str] = ()  # of this symmetry

    def run(self, family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
        """Measures what `add_arguments` declares; see `measure`."""
        check_seed(args.seed)
        return self.measure(family, blocks=args.blocks, seed=args.seed)

    def measure(self, family: StudiedFamily, *, blocks: str = MIDDLE, seed: int = 0) -> ProbeResult:
        """Applies the symmetry to blocks of every variant and compares them with the base.

        Deviates from BS 3.3, which permutes the base's MLP: here the variant is changed in all
        three controls, so that Eq. 2 divides by the same norm before and after.

        Args:
            family: Base and variants.
            blocks: See `chosen_blocks`.
            seed: Of the symmetry and of the block's inputs.

        Raises:
            InvalidRequestError: `blocks` names no layer.
            BadCheckpointError: NaN or infinite weights, or a file that changed.
        """
        rows = [
            row
            for layer in chosen_blocks(blocks, family.base.config.num_layers)
            for row in self._rows(family, layer, seed)
        ]
        return ProbeResult(
            title=self.title,
            columns=COLUMNS,
            rows=tuple(rows),
            facts=_facts(rows),
            notes=(*_NOTES, *self.notes),
        )

    def _rows(self, family: StudiedFamily, layer: int, seed: int) -> Iterator[tuple[Value, ...]]:
        config = family.base.config
        function = BlockFunction(config, layer, seed=seed)
        base = read_block(family.base, layer)
        for name, checkpoint in family.variants.items():
            before = read_block(checkpoint, layer)
            after = self.symmetry(before, config, np.random.default_rng([seed, layer]))
            output = function(before)
            change = float(np.abs(function(after) - output).max())
            relative = change / float(np.abs(output).max())
            for part in self.parts:
                place = (name, layer, part.label)
                yield (*place, ORIGINAL, *distance(base, before, part), None, None)
                yield (*place, MOVED, *distance(base, after, part), change, relative)


def _facts(rows: Sequence[tuple[Value, ...]]) -> dict[str, Value]:
    """Returns what each variant's part comes to over the blocks, and the worst change of all."""
    groups: dict[str, list[tuple[Value, ...]]] = {}
    for row in rows:
        variant, _, part, *_ = row
        groups.setdefault(f"{variant}, {part}", []).append(row)
    facts: dict[str, Value] = {
        f"{group}: {name}": value
        for group, found in groups.items()
        for name, value in _part_facts(found).items()
    }
    facts["worst_relative_change"] = float(_column(rows, "relative_change", MOVED).max())
    facts["float32_epsilon"] = float(np.finfo(np.float32).eps)
    return facts


def _part_facts(rows: Sequence[tuple[Value, ...]]) -> dict[str, Value]:
    cos, moved = (_column(rows, "cos", weights) for weights in (ORIGINAL, MOVED))
    was, now = (_column(rows, "symmetric", weights) for weights in (ORIGINAL, MOVED))
    differs = was > 0  # equal tensors have no ratio
    ratios = now[differs] / was[differs]
    return {
        "mean_cos": float(cos.mean()),
        "mean_cos_moved": float(moved.mean()),
        "largest_abs_cos_moved": float(np.abs(moved).max()),
        "least_symmetric_ratio": float(ratios.min()) if ratios.size else None,
    }


def _column(rows: Sequence[tuple[Value, ...]], name: str, weights: str) -> NDArray[np.float64]:
    """Returns a column's values of the rows of some weights, in their order."""
    chosen = [row for row in rows if row[COLUMNS.index("weights")] == weights]
    return np.array([row[COLUMNS.index(name)] for row in chosen], dtype=np.float64)
