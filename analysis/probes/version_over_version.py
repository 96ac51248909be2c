"""Whether later releases moved less from their bases than earlier ones (BS I, table 10)."""

from __future__ import annotations

import argparse

from analysis.family import StudiedFamily
from analysis.probes.other_pairs import Pairs, add_other_argument, scan_pairs
from analysis.probes.result import ProbeResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the later releases."""
    add_other_argument(parser)


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Compares releases."""
    return measure(family, [(base, variant) for base, variant in args.other])


def measure(family: StudiedFamily, others: Pairs = ()) -> ProbeResult:
    """Compares the mean ε of releases, in the order in which they are given.

    Args:
        family: The first releases; the first variant is what all others are held against.
        others: Later releases with bases of their own, of any architecture.

    Raises:
        InvalidRequestError: Two pairs of one name.
        LinkerError: As `StudiedFamily.open` and `scan`.
    """
    reports = scan_pairs(family, others)
    first = next(iter(reports.values())).mean_epsilon
    return ProbeResult(
        title="Perturbation from release to release",
        columns=("release", "blocks", "cos", "epsilon", "tightening"),
        rows=tuple(
            (
                label,
                len(report.blocks),
                report.mean_cos,
                report.mean_epsilon,
                first / report.mean_epsilon if report.mean_epsilon else None,
            )
            for label, report in reports.items()
        ),
        facts={},
        notes=(
            "tightening is the first release's mean ε over this one's: above 1, this one moved "
            "less. The order of releases is that of the command.",
            "BS table 10: Gemma 12.4, Mistral 23.3, Llama 1.15. Observational: size, data and "
            "procedure change between releases too.",
        ),
    )
