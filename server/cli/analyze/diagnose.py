"""`linker analyze diagnose BASE VARIANT …`: what stands out about each fine-tune, with reasons."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.diagnostics import (
    FLOORS_AWAY,
    SAME_ANSWERS_NATS,
    Kind,
    diagnose,
)
from analysis.distance import distance, rounding_floor
from analysis.family import StudiedFamily
from linker_core.errors import InvalidRequestError
from server.cli.analyze.members import find_members
from server.cli.analyze.output import Shown, show
from server.cli.analyze.studying import (
    Studied,
    add_study_arguments,
    check_draws,
    study_family,
)

_TEXT_TOKENS = 512
_MAX_TEXT_TOKENS = 8192  # a base's logits of them are kept: 4 GiB with 128 Ki tokens of vocabulary
EXAMPLE = """\
linker analyze diagnose models/base models/chat models/math --text text.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's arguments."""
    add_study_arguments(parser)
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="a text on which each fine-tune's KL to its base is measured as well, in nats per "
        "token (loads the models)",
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=_TEXT_TOKENS,
        metavar="N",
        help=f"tokens of the text that are read, from its beginning (default {_TEXT_TOKENS}, at "
        f"most {_MAX_TEXT_TOKENS})",
    )


def run(args: argparse.Namespace) -> int:
    """Studies and prints; stdout holds one JSON document under --json."""
    check_draws(args)
    if not 2 <= args.text_tokens <= _MAX_TEXT_TOKENS:
        raise InvalidRequestError(
            f"--text-tokens is {args.text_tokens}, expected 2 to {_MAX_TEXT_TOKENS}.",
            param="text_tokens",
        )
    members = find_members(args)
    with members.open() as family:
        ids = None if args.text is None else _tokens(args, family)
        found = study_family(args, members, family)
        kl = None if ids is None else _kl_to_base(family, ids)
    findings = diagnose(found.studies, names=found.names, kl_to_base=kl)
    rows = {
        name: asdict(distance(found.studies, number)) | {"kl": (kl or {}).get(name)}
        for number, name in enumerate(found.names)
    }
    notes = [*members.notes, *_notes(found)]
    document = {
        "base": members.base_name,
        "num_tensors": len(found.studies),
        "diagnostics": [one.to_json() for one in findings],
        "variants": rows,
    }
    findings_table = Shown(
        "Findings",
        ("fine-tune", "kind", "reason"),
        [(one.model, one.kind.value, one.reason) for one in findings],
        () if findings else (f"None of {', '.join(kind.value for kind in Kind)}.",),
    )
    show(args, document, [_distances(rows), findings_table], notes, members=members)
    return 0


def _kl_to_base(family: StudiedFamily, ids: list[int]) -> dict[str, float]:
    from analysis.behaviour import kl_to_base  # noqa: PLC0415 - brings torch along, here alone

    return kl_to_base(family, ids)


def _tokens(args: argparse.Namespace, family: StudiedFamily) -> list[int]:
    """Returns --text in the base's tokens."""
    from analysis.evaluation.texts import first_tokens, read_text  # noqa: PLC0415 - torch, too
    from linker_core.text.tokenizer import Tokenizer  # noqa: PLC0415

    return first_tokens(
        Tokenizer.load(family.base.path),
        read_text(args.text, param="text"),
        limit=args.text_tokens,
        vocab_size=family.base.config.vocab_size,
    )


def _distances(rows: Mapping[str, Mapping[str, Any]]) -> Shown:
    fields = ("cos", "epsilon", "floors", "region", "kl")
    cells = [
        (name, *(str(row[field]) if field == "region" else row[field] for field in fields))
        for name, row in rows.items()
    ]
    columns = ("fine-tune", "cos", "ε", "x floor", "region", "KL")
    return Shown("How far each fine-tune is from its base", columns, cells)


def _notes(found: Studied) -> list[str]:
    dtypes = sorted({dtype for study in found.studies for dtype in study.dtypes})
    floors = ", ".join(f"{dtype} {rounding_floor([dtype]):.2g}" for dtype in dtypes)
    return [
        "cos and ε: BS Eq. 1 and 2 over the tensors studied alone; regions of BS table 2. x floor: "
        f"the largest ε of a tensor over what rounding leaves ({floors}).",
        f"Degenerate: no tensor above {FLOORS_AWAY:g} floors, or, with --text, a KL to the base of "
        f"at most {SAME_ANSWERS_NATS:g} nats per token.",
    ]
