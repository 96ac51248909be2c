"""Pairs of a base and its fine-tune beside those of the family that is studied."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from analysis.family import StudiedFamily
from linker_core.errors import InvalidRequestError
from linker_core.sharing.report import ScanReport
from linker_core.sharing.scan import scan

Pairs = Sequence[tuple[Path, Path]]


def add_other_argument(parser: argparse.ArgumentParser) -> None:
    """Declares `--other`."""
    parser.add_argument(
        "--other",
        nargs=2,
        type=Path,
        action="append",
        default=[],
        metavar=("BASE", "VARIANT"),
        help="a pair of another family, called by its variant's folder; may be repeated",
    )


def scan_pairs(family: StudiedFamily, others: Pairs) -> dict[str, ScanReport]:
    """Returns name -> scan: the family's variants in their order, then the others.

    Raises:
        InvalidRequestError: Two pairs of one name.
        LinkerError: As `StudiedFamily.open` and `scan`.
    """
    check_pairs(family, others)
    reports = {label: scan(family.base, variant) for label, variant in family.variants.items()}
    for base, variant in others:
        label = label_of(variant)
        with StudiedFamily.open(base, {label: variant}) as pair:
            reports[label] = scan(pair.base, pair.variants[label])
    return reports


def label_of(variant: Path) -> str:
    """Returns what a pair of another family is called."""
    return variant.resolve().name


def check_pairs(family: StudiedFamily, others: Pairs) -> None:
    """Refuses pairs that cannot be scanned, before any is.

    Raises:
        InvalidRequestError: Two pairs of one name.
        LinkerError: As `StudiedFamily.open`.
    """
    labels = [*family.names, *(label_of(variant) for _, variant in others)]
    for base, variant in others:
        label = label_of(variant)
        if labels.count(label) > 1:
            raise InvalidRequestError(
                f"Two pairs are called {label!r:.60}. Name the variants' folders apart.",
                param="other",
            )
        StudiedFamily.open(base, {label: variant}).close()
