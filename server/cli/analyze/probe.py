"""`linker analyze probe [NAME MODEL …]`: one experiment on a family, or a list of all."""

from __future__ import annotations

import argparse
from functools import partial

from analysis import probes
from server.cli.analyze.deferred import DeferredParser
from server.cli.analyze.members import add_member_arguments, find_members
from server.cli.analyze.output import Shown, add_output_arguments, show

EXAMPLE = """\
linker analyze probe low-rank models/base models/chat
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the probes; what they take is declared by the one that is asked for."""
    add_output_arguments(parser)
    named = parser.add_subparsers(dest="probe", metavar="NAME", parser_class=DeferredParser)
    for name, answers in probes.PROBES.items():
        named.add_parser(
            name,
            declare=partial(_declare, name),
            help=answers,
            description=answers,
            allow_abbrev=False,
        )


def run(args: argparse.Namespace) -> int:
    """Runs the probe and prints its result, or lists all without a name."""
    if args.probe is None:
        _list(args)
        return 0
    members = find_members(args)
    with members.open() as family:
        result = probes.load(args.probe).run(family, args)
    tables = [Shown(result.title, result.columns, result.rows)]
    if result.facts:
        tables.append(Shown("Of all rows", ("fact", "value"), list(result.facts.items())))
    document = {
        "probe": args.probe,
        "base": members.base_name,
        "left_out": list(members.notes),
        **result.to_json(),
    }
    notes = [*members.notes, *result.notes]
    show(args, document, tables, notes, members=members, drawings=result.drawings)
    return 0


def _list(args: argparse.Namespace) -> None:
    rows = list(probes.PROBES.items())
    document = {"probes": [{"name": name, "answers": answers} for name, answers in rows]}
    show(args, document, [Shown("Probes", ("name", "answers"), rows)])


def _declare(name: str, parser: argparse.ArgumentParser) -> None:
    add_member_arguments(parser)
    # It may stand before the name too: a default here would undo that.
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON document"
    )
    probes.load(name).add_arguments(parser)
