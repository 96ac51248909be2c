"""Whether fine-tunes that moved farther gained more on a benchmark (BS figure 2)."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from analysis.evaluation.choices import ChoiceScore, pooled
from analysis.evaluation.mmlu import LIMIT
from analysis.evaluation.suite import Suite, SuiteFiles
from analysis.family import StudiedFamily
from analysis.probes.correlation import MIN_POINTS, pearson, pearson_interval
from analysis.probes.devices import CPU, add_device_argument, open_model
from analysis.probes.other_pairs import (
    Pairs,
    add_other_argument,
    check_pairs,
    label_of,
    scan_pairs,
)
from analysis.probes.result import ProbeResult
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint


class Gain(NamedTuple):
    """Points of accuracy, variant less base."""

    points: float
    stderr: float | None  # None where it was stated, not measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where gains come from: measured on questions, or stated."""
    add_other_argument(parser)
    parser.add_argument(
        "--mmlu", type=Path, metavar="DIR", help="a folder of SUBJECT_test.csv files"
    )
    parser.add_argument(
        "--tasks", type=Path, metavar="DIR", help="a folder of *.jsonl files with multiple choice"
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=LIMIT,
        help=f"the first so many of each subject and task (default {LIMIT})",
    )
    parser.add_argument(
        "--gain",
        nargs="+",
        default=[],
        metavar="VARIANT=POINTS",
        help="gains measured elsewhere, one for every variant, in the place of questions",
    )
    add_device_argument(parser)


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Measures or takes gains and correlates them."""
    others = [(base, variant) for base, variant in args.other]
    names = [*family.names, *(label_of(variant) for _, variant in others)]
    check_pairs(family, others)
    if args.gain:
        return correlate(family, stated_gains(args.gain, names), others)
    if args.mmlu is None and args.tasks is None:
        raise InvalidRequestError(
            "Nothing says what a variant gained: give --mmlu or --tasks to measure it, or --gain.",
            param="gain",
        )
    _check_number(len(names))  # before hours of measuring
    files = SuiteFiles(mmlu=args.mmlu, tasks=args.tasks, num_questions=args.questions)
    gains = measured_gains(family, Suite.load(files), others, device=args.device)
    return correlate(family, gains, others)


def correlate(family: StudiedFamily, gains: Mapping[str, Gain], others: Pairs = ()) -> ProbeResult:
    """Correlates every pair's mean ε with its gain.

    Args:
        family: Base and variants.
        gains: Of every pair, by the variant's name.
        others: Pairs of other families.

    Raises:
        InvalidRequestError: Fewer than three pairs, or two of one name.
        LinkerError: As `StudiedFamily.open` and `scan`.
    """
    _check_number(len(family.variants) + len(others))
    reports = scan_pairs(family, others)
    epsilons = [report.mean_epsilon for report in reports.values()]
    points = [gains[label].points for label in reports]
    found = pearson(epsilons, points)
    interval = pearson_interval(epsilons, points)
    return ProbeResult(
        title="Perturbation against gain on a benchmark",
        columns=("variant", "epsilon", "cos", "gain_points", "stderr"),
        rows=tuple(
            (label, report.mean_epsilon, report.mean_cos, *gains[label])
            for label, report in reports.items()
        ),
        facts={
            "pairs": len(reports),
            "pearson_r": found and found.r,
            "pearson_p": found and found.p,
            "pearson_low": interval and interval[0],
            "pearson_high": interval and interval[1],
        },
        notes=(
            "epsilon and cos are means over the blocks (BS Eq. 1, 2); gain_points is the variant's "
            "accuracy less the base's in points, its error that of the questions' own changes. The "
            "interval of r is Fisher's, at 95 %; it takes pairs for independent, and fine-tunes of "
            "one base are not.",
            "BS figure 2: r = 0.819 over eight families of other bases.",
        ),
    )


def _check_number(num_pairs: int) -> None:
    if num_pairs < MIN_POINTS:
        raise InvalidRequestError(
            f"A correlation needs at least {MIN_POINTS} pairs: two always lie on a line. Name "
            "more variants, or --other pairs."
        )


def stated_gains(stated: Sequence[str], names: Sequence[str]) -> dict[str, Gain]:
    """Returns what `--gain` says.

    Raises:
        InvalidRequestError: Not VARIANT=POINTS, an unknown variant, or one without a gain.
    """
    gains: dict[str, Gain] = {}
    for word in stated:
        name, _, value = word.rpartition("=")
        try:
            points = float(value)
        except ValueError:
            points = math.nan
        if not name or not math.isfinite(points):
            raise InvalidRequestError(
                f"--gain {word!r:.60}: expected VARIANT=POINTS, such as chat=1.5.", param="gain"
            )
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(names)}."
            raise InvalidRequestError(f"--gain: no variant {name!r:.60}. {hint}", param="gain")
        gains[name] = Gain(points, None)
    if missing := [name for name in names if name not in gains]:
        raise InvalidRequestError(
            f"--gain says nothing of {', '.join(missing)}. State a gain for every variant.",
            param="gain",
        )
    return gains


def measured_gains(
    family: StudiedFamily, suite: Suite, others: Pairs = (), *, device: str = CPU
) -> dict[str, Gain]:
    """Asks every base and variant the suite's questions, one model in memory at a time.

    Raises:
        InvalidRequestError: A model diverges.
        LinkerError: A checkpoint that cannot be read or does not fit, or a damaged tokenizer.
    """
    gains = _gains(family, suite, device)
    for base, variant in others:
        label = label_of(variant)
        with StudiedFamily.open(base, {label: variant}) as pair:
            gains |= _gains(pair, suite, device)
    return gains


def _gains(family: StudiedFamily, suite: Suite, device: str) -> dict[str, Gain]:
    before = _score(family.base, suite, device)
    return {
        label: Gain(*_score(variant, suite, device).points_from(before))
        for label, variant in family.variants.items()
    }


def _score(checkpoint: Checkpoint, suite: Suite, device: str) -> ChoiceScore:
    """Returns the score over all questions, each in the model's own tokens."""
    model = open_model(checkpoint, device)
    scores = suite.encode(model).measure(model)
    score = pooled([*scores.mmlu.values(), *scores.tasks.values()])
    if score.diverged:
        raise InvalidRequestError(
            f"{checkpoint.path}: the model's outputs are no numbers, so it answers no question. "
            "Leave it out."
        )
    return score
