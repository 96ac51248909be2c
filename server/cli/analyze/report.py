"""`linker analyze report BASE VARIANT … -o report.html`: tables and figures in one file."""

from __future__ import annotations

import argparse
import errno
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from analysis.report.fine_tunes import fine_tune_sections
from analysis.report.included import Included, read_included
from analysis.report.page import render_page
from analysis.report.shares import share_sections
from analysis.report.tensors import method_section, tensor_section
from linker_core.errors import InvalidRequestError
from server.cli.analyze.members import find_members
from server.cli.analyze.output import show
from server.cli.analyze.studying import Studied, add_study_arguments, check_draws, study_family
from server.cli.sizes import mib

EXAMPLE = """\
linker analyze eval models/base models/chat models/math models/code \\
    --wikitext text.txt --json > eval.json
linker analyze report models/base models/chat models/math models/code \\
    -o report.html --include eval.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_study_arguments(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the HTML file to write"
    )
    parser.add_argument(
        "--include",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="what another study (eval, transfer, probe, …) printed with --json: its tables and "
        "figures become a section; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Studies the family and writes the file, whole or not at all."""
    check_draws(args)
    _check_target(args.output)
    included = [read_included(path) for path in args.include]
    members = find_members(args)
    with members.open() as family:
        found = study_family(args, members, family)
    text = _page(args, found, included)
    _write(args.output, text)
    num_bytes = len(text.encode())
    document = {"path": str(args.output), "bytes": num_bytes, "notes": members.notes}
    show(args, document, [], [*members.notes, f"{args.output}: {mib(num_bytes)}"])
    return 0


def _page(args: argparse.Namespace, found: Studied, included: Sequence[Included]) -> str:
    summary = found.summary(args)
    members = found.members
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = [
        f"Base: {members.base_name}. Fine-tunes: {', '.join(found.names)}. "
        f"Tensors: {summary['num_tensors']}.",
        f"Made {made} by linker {version('linker-llm')}.",
        *members.notes,
    ]
    sections = [
        *share_sections(found.studies, summary),
        *fine_tune_sections(found.studies, summary),
        *(one.section(base=members.base_name, fine_tunes=found.names) for one in included),
        tensor_section(found.studies),
        method_section(found.studies, summary),
    ]
    return render_page(f"Fine-tunes of {members.base_name}", facts, sections)


def _check_target(path: Path) -> None:
    """Refuses a file that cannot be written, before a study is made for it.

    Raises:
        InvalidRequestError: See above.
    """
    for refused, code in (
        (not path.parent.is_dir(), errno.ENOENT),
        (path.is_dir(), errno.EISDIR),
        (not os.access(path.parent, os.W_OK), errno.EACCES),
    ):
        if refused:
            raise _unwritable(path, OSError(code, os.strerror(code)))


def _write(path: Path, text: str) -> None:
    """Writes a file that others see whole or not at all.

    Raises:
        InvalidRequestError: It cannot be written.
    """
    try:
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        Path(unfinished).replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:  # an interrupt leaves nothing, either; after `replace` there is nothing to remove
        Path(unfinished).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(path: Path, error: OSError) -> InvalidRequestError:
    return InvalidRequestError(
        f"The report cannot be written to {path}: {error.strerror}. Name a file in a folder that "
        "you may write to.",
        param="output",
    )
