"""Whether fine-tunes' deltas lie along the refusal direction (FM 3.2, appendix D).

Every variant's direction is removed from what writes to the residual stream, and the pairwise
cosines of the deltas to the base are taken before and after. FM finds changes below 0.001 and calls
refusal orthogonal to what fine-tunes share; it does not say whether the base was ablated too, so
both forms are given (`analysis.probes.ablation`), each beside a random direction's.
Legend: N variants, H hidden width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.probes.ablation import ablate
from analysis.probes.devices import CPU, add_device_argument, open_model
from analysis.probes.directions import (
    Direction,
    check_layer,
    difference_of_means,
    last_activations,
)
from analysis.probes.prompting import asked, encoded_prompts, prompts_of
from analysis.probes.result import ProbeResult, Value
from analysis.seed import check_seed
from linker_core.errors import InvalidRequestError

NUM_PROMPTS = 128  # of each set; Arditi et al. take as many
_CHANGES = ("deltas_change", "deltas_change_random", "weights_change", "weights_change_random")
COLUMNS = ("variant", "other", "directions_cos", "cos", *_CHANGES)
_FM_LARGEST = 0.001
_FEWEST = 2
_NOTES = (
    "cos: mean over FM's seven projections of all layers of the cosine of two variants' deltas; "
    "of the seven only o and down write to the residual stream and change.",
    "deltas_change: of that cosine when each variant's direction is removed from variant and base; "
    "weights_change: from the variant alone, which also takes out what it shares with the base "
    "along the direction, a part that can be as large as a small delta itself. _random: the same "
    "with a random direction for each variant: what removing any rank-1 part does.",
    "along: share of the squared deltas of o and down that lies along the variant's direction, "
    "over the 1/H that lies along a random one.",
    "directions_cos: cosine of the two variants' directions. separation: distance of the two sets' "
    "means along the direction, in standard deviations within a set, at the layer where it is "
    "largest; few prompts in many dimensions make it large by construction.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the two sets of prompts."""
    parser.add_argument(
        "--refused",
        type=Path,
        required=True,
        metavar="FILE",
        help='prompts of one kind, JSON lines of "text" or {"prompt": "text"}',
    )
    parser.add_argument(
        "--answered",
        type=Path,
        required=True,
        metavar="FILE",
        help="prompts of the other kind, JSON lines as well",
    )
    parser.add_argument(
        "--num-prompts",
        type=int,
        default=NUM_PROMPTS,
        help=f"of each kind, at most (default {NUM_PROMPTS})",
    )
    parser.add_argument(
        "--layer",
        type=int,
        help="whose output is looked at, from 0 (default where the two kinds are farthest apart)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random directions (default 0)")
    add_device_argument(parser)


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Ablates every variant's direction and compares their deltas."""
    return measure(
        family,
        args.refused,
        args.answered,
        num_prompts=args.num_prompts,
        layer=args.layer,
        seed=args.seed,
        device=args.device,
    )


def measure(
    family: StudiedFamily,
    refused: Path,
    answered: Path,
    *,
    num_prompts: int = NUM_PROMPTS,
    layer: int | None = None,
    seed: int = 0,
    device: str = CPU,
) -> ProbeResult:
    """Compares the variants' deltas with and without each variant's direction.

    Args:
        family: Base and at least two variants.
        refused: Prompts of one kind, JSON lines.
        answered: Prompts of the other kind.
        num_prompts: Of each, at most.
        layer: Whose output the direction is of; None: see `difference_of_means`.
        seed: Of the random directions.
        device: Where models are computed.

    Raises:
        InvalidRequestError: Fewer than two variants or prompts, prompts of no use, or no such
            layer or device.
        LinkerError: A checkpoint that cannot be read or does not fit into memory.
    """
    if len(family.variants) < _FEWEST:
        raise InvalidRequestError("Similarity takes two fine-tunes; name at least two.")
    check_seed(seed)
    check_layer(layer, family.base.config.num_layers)
    sets = [
        prompts_of(path, param=param, limit=num_prompts)
        for path, param in ((refused, "refused"), (answered, "answered"))
    ]
    if min(map(len, sets)) < _FEWEST:
        raise InvalidRequestError("Each set needs at least two prompts, or it has no spread.")
    directions = _directions(family, sets, layer, device)
    own_NH = np.stack([direction.unit_H for direction in directions.values()])
    random_NH = np.random.default_rng(seed).standard_normal(own_NH.shape)
    random_NH /= np.linalg.norm(random_NH, axis=1, keepdims=True)
    found = ablate(family, own_NH, random_NH)
    forms = (found.deltas_NN, found.deltas_random_NN, found.weights_NN, found.weights_random_NN)
    changed = {name: form_NN - found.cos_NN for name, form_NN in zip(_CHANGES, forms, strict=True)}
    rows: list[tuple[Value, ...]] = [
        (
            *(family.names[i], family.names[j]),
            *(float(own_NH[i] @ own_NH[j]), float(found.cos_NN[i, j])),
            *(float(change_NN[i, j]) for change_NN in changed.values()),
        )
        for i, j in combinations(range(len(family.names)), 2)
    ]
    facts: dict[str, Value] = {
        "largest change of FM": _FM_LARGEST,
        **{f"largest {name}": float(np.abs(form_NN).max()) for name, form_NN in changed.items()},
        **dict(_direction_facts(directions, found.along_N)),
    }
    return ProbeResult(
        title="Cosines of deltas with and without the direction between two sets of prompts",
        columns=COLUMNS,
        rows=tuple(rows),
        facts=facts,
        notes=(f"{len(sets[0])} and {len(sets[1])} prompts.", *_NOTES),
    )


def _direction_facts(
    directions: Mapping[str, Direction], along_N: NDArray[np.float64]
) -> Iterator[tuple[str, Value]]:
    """Yields what is known of each variant's direction."""
    for (name, direction), along in zip(directions.items(), along_N, strict=True):
        yield f"{name}: along", float(along)
        yield f"{name}: layer", direction.layer
        yield f"{name}: separation", direction.separation


def _directions(
    family: StudiedFamily, sets: list[list[str]], layer: int | None, device: str
) -> dict[str, Direction]:
    """Returns each variant's direction, one model in memory at a time."""
    found: dict[str, Direction] = {}
    for name, checkpoint in family.variants.items():
        model = open_model(checkpoint, device)
        refused_PLH, answered_PLH = (
            last_activations(model, encoded_prompts(model, asked(prompts), room=0))
            for prompts in sets
        )
        found[name] = difference_of_means(refused_PLH, answered_PLH, layer=layer)
    return found
