"""`linker analyze kernel --export`: base + alpha K as a model, checked before anything is read."""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.family import StudiedFamily
from analysis.kernel.export import check_scale, export_kernel
from analysis.kernel.kernel import Kernel
from linker_core.errors import InvalidRequestError
from linker_core.residency.new_folder import check_target
from server.cli.analyze.members import Members
from server.cli.progress import byte_progress


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --export and --alpha."""
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="write base + alpha K as a model, a new folder"
    )
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="scale of the kernel in the export (default 1)"
    )


def check_export(args: argparse.Namespace) -> None:
    """Refuses a target that cannot be made: a chain on texts may take hours before it is written.

    Raises:
        ConflictError: The target exists.
        InvalidRequestError: The scale is no number, or there is no folder to make the target in.
    """
    if args.export is None:
        return
    check_scale(args.alpha)
    if not args.export.parent.is_dir():  # beside `check_target`, which says no path
        raise InvalidRequestError(
            f"--export {args.export}: there is no folder {args.export.parent}. "
            "Name a folder in one that exists.",
            param="export",
        )
    check_target(args.export)


def check_outside(args: argparse.Namespace, members: Members) -> None:
    """Refuses to write into a model that is read.

    Raises:
        InvalidRequestError: See above.
    """
    if args.export is None:
        return
    for folder in (members.base, *members.variants.values()):
        if args.export.resolve().is_relative_to(folder.resolve()):
            raise InvalidRequestError(
                f"--export {args.export} lies in {folder}, a model that is read. Name a folder "
                "outside.",
                param="export",
            )


def exported(args: argparse.Namespace, family: StudiedFamily, kernel: Kernel) -> str:
    """Writes the model; returns what is said of it."""
    with byte_progress("writing") as progress:
        export_kernel(family, kernel, args.export, scale=args.alpha, progress=progress)
    return f"Wrote {args.export}: base + {args.alpha:g} · K, ready to be onboarded."
