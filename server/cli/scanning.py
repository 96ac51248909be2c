"""Scans as commands do them: in a disposable process, or a sample of rows in this one."""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path

from linker_core.sharing.report import ScanReport
from linker_core.sharing.sampled_scan import sampled_scan
from linker_core.sharing.thresholds import Thresholds, choose_thresholds, load_tiers
from server.cli.checkpoints import open_pair
from server.cli.progress import byte_progress
from server.onboarding.scanner import Scanner

_SEED = 0  # the same command reads the same rows


def add_threshold_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where BS Eq. 3's two numbers come from."""
    parser.add_argument("--tau-cos", type=float, help="least cosine of a shared block (0.999)")
    parser.add_argument("--tau-frob", type=float, help="largest ε of a shared block (0.05)")
    parser.add_argument("--tier", help=f"thresholds of a known family: {', '.join(load_tiers())}")


def add_sample_argument(parser: argparse.ArgumentParser) -> None:
    """Declares `--sample`."""
    parser.add_argument(
        "--sample",
        type=float,
        metavar="FRACTION",
        help="read this part of each matrix's rows (at least 128), and whole only those blocks "
        "whose bounds hold a threshold; a change in a few rows can go unseen",
    )


def scan_apart(donor: Path, variant: Path) -> ScanReport:
    """Scans all of a pair in a process of its own, with a progress bar.

    Raises:
        LinkerError: See `scan`; the directory that cannot be opened is named.
    """
    with open_pair(donor, variant), byte_progress("scanning") as progress:
        work = Scanner().run(
            variant,
            donor=donor,
            hashed=False,
            on_progress=lambda _stage, done, total: progress(done, total),
        )
        result = asyncio.run(work)
    assert result.report is not None
    return ScanReport.from_json(result.report)


def scan_sample(
    donor: Path,
    variant: Path,
    *,
    fraction: float,
    tau_cos: float | None = None,
    tau_frob: float | None = None,
    tier: str | None = None,
) -> ScanReport:
    """Scans a sample of rows, and whole what it leaves open under these thresholds.

    Raises:
        LinkerError: See `sampled_scan`; the directory that cannot be opened is named.
    """

    def choose(report: ScanReport) -> Thresholds:
        return choose_thresholds(report, tau_cos=tau_cos, tau_frob=tau_frob, tier=tier)

    with open_pair(donor, variant) as (a, b), byte_progress("sampling") as progress:
        return sampled_scan(
            a, b, fraction=fraction, rng=random.Random(_SEED), choose=choose, progress=progress
        )
