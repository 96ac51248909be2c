"""`linker analyze kernel --texts`: what kernels do to texts. Brings torch along."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from analysis.family import StudiedFamily
from analysis.kernel.compose import Composition
from analysis.kernel.kernel import Kernel
from server.cli.analyze.kernel_capability import capability
from server.cli.analyze.kernel_composed import SUM
from server.cli.analyze.kernel_found import Part
from server.cli.analyze.kernel_texts import (
    Losses,
    Texts,
    base_model,
    companions,
    loss_drawing,
    loss_table,
    losses_to_json,
    measure,
)


def on_texts(
    args: argparse.Namespace,
    family: StudiedFamily,
    texts: Texts,
    kernel: Kernel,
    together: Composition | None,
) -> Iterator[Part]:
    """Yields what is asked for."""
    if args.capability is None:
        yield companions(args, family, kernel, texts)
    if together is not None:
        yield _composed(args, family, together, texts)
    if args.capability is not None:
        yield capability(args, family, kernel, texts)


def _composed(
    args: argparse.Namespace, family: StudiedFamily, found: Composition, texts: Texts
) -> Part:
    """Returns what specialists do to the texts, by themselves and together."""
    kernels = {**found.specialists, SUM: found.together}
    losses = measure(base_model(args, family), family, kernels, texts)
    document = {
        "losses": losses_to_json(losses),
        "interference": _interference(losses, found.specialists),
    }
    title = "Specialists and their sum on the texts"
    return Part("composition", document, [loss_table(title, losses)], [loss_drawing(title, losses)])


def _interference(losses: Losses, specialists: Mapping[str, object]) -> dict[str, Any]:
    """Returns what the others' kernels do to each specialist on the text of its own label."""
    return {
        label: losses[SUM][label].change_from(losses[label][label]).to_json()
        for label in specialists
        if label in losses[label]
    }
