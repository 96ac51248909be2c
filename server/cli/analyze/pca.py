"""`linker analyze pca BASE VARIANT …`: FM tables 2, 6 and 8, no share without its null."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from analysis.components import correlate_families
from server.cli.analyze import pca_tables as tables
from server.cli.analyze.members import Members, add_second_family, find_families, selected
from server.cli.analyze.output import Shown, show
from server.cli.analyze.studying import (
    Studied,
    add_study_arguments,
    check_draws,
    check_number,
    study_family,
)

_FEWEST = 2
_WHY = (
    "PC1 needs three (centred with two it is 100 % by construction), the shared fraction two; "
    "`linker analyze diagnose` says what one alone can"
)
_CORRELATED = ("pc1_centred", "pc1_normalised_centred")
EXAMPLE = """\
linker analyze pca models/base models/chat models/math models/code
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's arguments."""
    add_study_arguments(parser, least=_FEWEST)
    add_second_family(parser, "--other", purpose="correlate its PC1 by layer with the first's")
    parser.add_argument("--list", action="store_true", help="list every tensor as well")


def run(args: argparse.Namespace) -> int:
    """Studies and prints; stdout holds one JSON document under --json."""
    check_draws(args)
    named = [args.models] if args.other is None else [args.models, args.other]
    families = find_families(args, named, least=_FEWEST)
    check_number(families[0], least=_FEWEST, why=_WHY)
    if args.other is not None:
        for one in families:
            check_number(one, least=3, why="PC1 needs three")
    found, *others = _studied(args, families)
    across = _across(found, others[0]) if others else None
    summary = found.summary(args)
    document = {
        "summary": summary,
        "tensors": [study.to_json() for study in found.studies],
        "cross_family": across,
    }
    shown = [*_tables(found, summary), *([tables.across_table(across)] if across else [])]
    if args.list:
        shown.append(tables.tensor_table(found.studies))
    notes = [*found.notes, *tables.notes(summary)]
    show(args, document, shown, notes, members=found.members)
    return 0


def _studied(args: argparse.Namespace, families: Sequence[Members]) -> list[Studied]:
    """Studies one family after the other, once all are open and have the tensors asked for."""
    with ExitStack() as opened:
        folders = [opened.enter_context(members.open()) for members in families]
        for family in folders:
            selected(args, family)
        return [
            study_family(args, members, family)
            for members, family in zip(families, folders, strict=True)
        ]


def _across(ours: Studied, theirs: Studied) -> dict[str, Any]:
    """Returns the correlations of both kinds of centred PC1, as plain JSON values."""
    return {
        "families": _labels(ours.members, theirs.members),
        "num_variants": [len(ours.names), len(theirs.names)],
        **{
            field: {
                group: None if found is None else asdict(found)
                for group, found in correlate_families(
                    ours.studies, theirs.studies, field=field
                ).items()
            }
            for field in _CORRELATED
        },
    }


def _labels(ours: Members, theirs: Members) -> list[str]:
    """Returns the bases' names, with the folder above where they are called alike."""
    names = [ours.base_name, theirs.base_name]
    if names[0] != names[1]:
        return names
    return [f"{one.base.resolve().parent.name}/{one.base_name}" for one in (ours, theirs)]


def _tables(found: Studied, summary: dict[str, Any]) -> list[Shown]:
    if summary["shared_fraction"] is not None:
        return [tables.shared_table(summary, found.studies), tables.variant_table(summary)]
    return [
        tables.family_table(summary),
        tables.component_table(summary, kind="_centred"),
        tables.component_table(summary, kind="_normalised_centred"),
        tables.gap_table(summary),
        tables.variant_table(summary),
        tables.loading_table(summary),
        tables.cosine_table(summary),
    ]
