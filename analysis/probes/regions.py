"""Which pairs of a family are aligned, boundary or outside, variants with each other included.

BS table 2.
"""

from __future__ import annotations

import argparse
import itertools

from analysis.family import StudiedFamily
from analysis.probes.result import ProbeResult
from linker_core.sharing.scan import scan

BASE = "base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares nothing: the models say it all."""


def run(family: StudiedFamily, _args: argparse.Namespace) -> ProbeResult:
    """Compares all pairs."""
    return measure(family)


def measure(family: StudiedFamily) -> ProbeResult:
    """Compares the base with every variant and each variant with those after it.

    Raises:
        BadCheckpointError: NaN or infinite weights, or a file that changed.
    """
    models = [(BASE, family.base), *family.variants.items()]
    rows = []
    for (left, a), (right, b) in itertools.combinations(models, 2):
        report = scan(a, b)
        cosines = [block.cos for block in report.blocks]
        epsilons = [block.epsilon for block in report.blocks]
        kind = "cross-variant" if a is not family.base else "from the base"
        rows.append((
            f"{left} → {right}", kind, report.mean_cos, min(cosines), report.mean_epsilon,
            max(epsilons), report.region.value,
        ))  # fmt: skip
    return ProbeResult(
        title="Regions of all pairs",
        columns=("pair", "kind", "cos", "cos_min", "epsilon", "epsilon_max", "region"),
        rows=tuple(rows),
        facts={},
        notes=(
            "cos and epsilon are means over the blocks of BS Eq. 1 and 2, with the farthest block "
            "beside them; ε divides by the norm of the first of the pair.",
            "outside: cos < 0.97 or ε > 0.25; else boundary: cos < 0.99 or ε > 0.10; else "
            "aligned. BS table 2: instruct 0.9997 and 0.015, continued pre-training 0.52-0.75 and "
            "0.30-0.83, and instruct → Coder as far as base → Coder.",
        ),
    )
