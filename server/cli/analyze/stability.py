"""`linker analyze stability BASE VARIANT …`: FM table 7, PC1 without each fine-tune in turn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from analysis.components import mean
from analysis.record import TensorStudy
from analysis.stability import CORE_COSINE, MIN_CENTRED, MIN_UNCENTRED, role_of
from server.cli.analyze.members import find_members
from server.cli.analyze.output import Shown, show
from server.cli.analyze.studying import (
    Studied,
    add_study_arguments,
    check_draws,
    check_number,
    study_family,
)

_WHY = "leaving one of three out is the least that says anything"
_TITLES = {"centred": "centred (FM's)", "uncentred": "uncentred"}
EXAMPLE = """\
linker analyze stability models/base models/chat models/math models/code
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's arguments."""
    add_study_arguments(parser, least=MIN_UNCENTRED)


def run(args: argparse.Namespace) -> int:
    """Studies and prints; stdout holds one JSON document under --json."""
    check_draws(args)
    members = find_members(args, least=MIN_UNCENTRED)
    check_number(members, least=MIN_UNCENTRED, why=_WHY)
    with members.open() as family:
        found = study_family(args, members, family)
    suffixes = {"uncentred": "_uncentred"}
    if len(found.names) >= MIN_CENTRED:
        suffixes = {"centred": ""} | suffixes
    rows = {way: _rows(found, suffix) for way, suffix in suffixes.items()}
    notes = [*found.notes, *_notes(len(found.names))]
    document = {
        "base": members.base_name,
        "num_tensors": len(found.studies),
        "jackknife": rows,
        "tensors": [_tensor(study) for study in found.studies],
    }
    show(args, document, [_table(way, rows[way]) for way in rows], notes, members=members)
    return 0


def _rows(found: Studied, suffix: str) -> dict[str, dict[str, Any]]:
    """Returns FM table 7: a row for each fine-tune, means and the least over tensors."""
    rows = {}
    for number, name in enumerate(found.names):
        cosines = {
            study.name: cosine
            for study in found.studies
            if (cosine := getattr(study, f"loo_cosines{suffix}")[number]) is not None
        }
        role = role_of(list(cosines.values()))
        rows[name] = {
            "cosine": mean(cosines.values()),
            "cosine_min": min(cosines.values(), default=None),
            "tensor_of_min": min(cosines, key=lambda tensor: cosines[tensor], default=None),
            "pc1_shift": mean(
                getattr(study, f"loo_pc1_shifts{suffix}")[number] for study in found.studies
            ),
            "role": None if role is None else role.value,
        }
    return rows


def _tensor(study: TensorStudy) -> dict[str, Any]:
    fields = (
        "loo_cosines", "loo_pc1_shifts", "loo_cosines_uncentred", "loo_pc1_shifts_uncentred",
    )  # fmt: skip
    return {"name": study.name} | {field: getattr(study, field) for field in fields}


def _table(way: str, rows: dict[str, dict[str, Any]]) -> Shown:
    columns = ("left out", "mean cos", "least", "PC1 shift", "role")
    fields = ("cosine", "cosine_min", "pc1_shift", "role")
    cells = [(name, *(row[field] for field in fields)) for name, row in rows.items()]
    return Shown(f"PC1 without each fine-tune, {_TITLES[way]} (FM table 7)", columns, cells)


def _notes(num_models: int) -> Sequence[str]:
    notes = [
        "cos: between PC1's directions with and without it, raw deltas; core: mean above "
        f"{CORE_COSINE:g}. PC1 shift: its share without minus with, which rises by itself as "
        f"fewer are left: unrelated equals, by {_drift(num_models - 1):+.3f} centred and "
        f"{_drift(num_models):+.3f} uncentred."
    ]
    if num_models < MIN_CENTRED:
        notes.append(
            "Centred it needs four: of the two that three leave, PC1 is 100 % by construction."
        )
    return notes


def _drift(num_directions: int) -> float:
    return 1 / (num_directions - 1) - 1 / num_directions
