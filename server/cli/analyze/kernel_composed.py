"""`linker analyze kernel --compose`: specialists' kernels and how they meet (FM §6)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from analysis.gram import TensorGram
from analysis.kernel.compose import Composition, check_specialists, compose
from analysis.kernel.robust import STRATEGIES
from analysis.selection import Component, component_of
from server.cli.analyze.kernel_text_arguments import labelled
from server.cli.analyze.output import Shown

SUM = "their sum"


def check_composed(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuses a --compose that makes no sense, before anything is read.

    Raises:
        InvalidRequestError: See `check_specialists`.
    """
    if args.compose:
        check_specialists(_specialists(args), names)


def composed(
    args: argparse.Namespace, names: tuple[str, ...], grams: Sequence[TensorGram]
) -> Composition:
    """Returns the kernels that --compose asks for.

    Raises:
        InvalidRequestError: The specialists make no sense.
    """
    return compose(
        grams,
        _specialists(args),
        names=names,
        seed=args.seed,
        temperature=args.temperature,
        strategy=STRATEGIES[args.strategy](),
    )


def composition(args: argparse.Namespace, found: Composition) -> tuple[dict[str, Any], Shown]:
    """Returns how specialists meet, as JSON and as a table; on texts nothing is measured yet."""
    kernels = {**found.specialists, SUM: found.together}
    document = {
        "specialists": {label: list(members) for label, members in _specialists(args).items()},
        "norms": {label: kernel.norm for label, kernel in kernels.items()},
        "cosines": [
            {"of": list(pair), "cos": cosine, "by_component": _by_component(found, pair)}
            for pair, cosine in found.cosines.items()
        ],
        "losses": {},
        "interference": {},
    }
    return document, _cosine_table(found)


def _specialists(args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    return {
        label: tuple(members.split(","))
        for label, members in labelled(args.compose, "compose").items()
    }


def _by_component(found: Composition, pair: tuple[str, str]) -> dict[str, float]:
    """Returns mean cosines over the tensors of each component."""
    cosines: dict[str, list[float]] = {}
    for name, cosine in found.tensor_cosines[pair].items():
        component = component_of(name)
        cosines.setdefault(component.value if component else "others", []).append(cosine)
    return {label: fmean(found) for label, found in cosines.items()}


def _cosine_table(found: Composition) -> Shown:
    components = [component.value for component in Component]
    rows = []
    for pair, cosine in found.cosines.items():
        means = _by_component(found, pair)
        rows.append((" · ".join(pair), round(cosine, 3), *(_rounded(means, c) for c in components)))
    note = "Cosines of 0 are specialists that do not meet; all tensors joined, then by component."
    return Shown("Cosine between specialists' kernels", ("pair", "all", *components), rows, (note,))


def _rounded(means: Mapping[str, float], component: str) -> float | None:
    return round(means[component], 3) if component in means else None
