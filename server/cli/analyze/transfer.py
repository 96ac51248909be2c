"""`linker analyze transfer BASE VARIANT … --source BASE VARIANT …`: FM's table 5."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from analysis.drawing import Drawing, Shape
from analysis.evaluation.suite import EncodedSuite, Scores, Suite
from analysis.evaluation.sweep import changes, check_scales
from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.kernel.kernel import check_several
from analysis.model import StudyModel
from analysis.transfer.agreement import Agreement, agreements
from analysis.transfer.conditions import (
    BEYOND_FM,
    FM_CONDITIONS,
    Condition,
    Outcome,
    matching_tensors,
    measure_conditions,
)
from analysis.transfer.side import Side
from linker_core.text.tokenizer import Tokenizer
from server.cli.analyze.device_arguments import add_device_arguments
from server.cli.analyze.kernel import add_kernel_arguments, check_kernel_arguments, kernel_of
from server.cli.analyze.members import (
    add_member_arguments,
    add_second_family,
    add_tensor_arguments,
    find_families,
    selected,
)
from server.cli.analyze.output import Cell, Shown, add_output_arguments, show
from server.cli.analyze.score_drawings import metric_drawings
from server.cli.analyze.scores import INTERVALS, METRICS, change_cell, measured, value_cell
from server.cli.analyze.suite_arguments import (
    add_suite_arguments,
    chosen_device,
    suite_files,
)

_LOG = logging.getLogger(__name__)
_BASELINES = {True: "C0", False: "C6"}  # whether it is the target's
_NOTES = (
    "C0-C7 are FM's table 5; A3 and A4 are C3 and C4 aligned. S2 is C2 with the rows and the "
    "columns of each tensor in random orders; N1, N2 and N5 add noise of the norms of C1, C2 and "
    "C5, tensor by tensor: what a kernel does beyond them, its direction does.",
    "sign-norm (FM §3.5): each tensor's kernel takes the sign that correlates with the target's "
    "mean delta, and that mean's norm. The sampled weights cancel in it.",
    "Perplexities of C0-C5 are in the target's tokens, those of C6 and C7 in the source's: where "
    "the tokenizers differ, the two cannot be compared with each other.",
)
EXAMPLE = """\
linker analyze transfer qwen/base qwen/chat qwen/math \\
    --source llama/base llama/chat llama/math --wikitext text.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's arguments."""
    add_member_arguments(parser, least=2)
    add_second_family(
        parser, "--source", purpose="its kernel is brought to the first's base", required=True
    )
    parser.add_argument(
        "--names",
        nargs=2,
        metavar=("TARGET", "SOURCE"),
        help="what the tables call the two families",
    )
    add_tensor_arguments(parser)
    add_kernel_arguments(parser)
    parser.add_argument("--alpha", type=float, default=1.0, help="scale of all kernels (default 1)")
    parser.add_argument(
        "--fm-only",
        action="store_true",
        help="FM's conditions C0 to C7 alone, without the controls",
    )
    add_suite_arguments(parser, protocol="full")
    add_device_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measures all conditions and prints them; stdout holds one JSON document under --json."""
    check_scales([args.alpha], option="alpha")
    check_kernel_arguments(args)
    chosen_device(args)
    members, source_members = find_families(args, [args.models, args.source], least=2)
    for each in (members, source_members):
        check_several(tuple(each.variants))
    with members.open() as target, source_members.open() as source:
        wanted = selected(args, target)
        names = matching_tensors(target.base, source.base, wanted)
        suite = Suite.load(suite_files(args))
        encoded, encoded_back = (
            EncodedSuite(suite, Tokenizer.load(family.base.path), family.base.config)
            for family in (target, source)
        )
        own, other = (
            Side.of(family, kernel_of(args, family.names, gram_pass(family, names)))
            for family in (target, source)
        )
        agreed = agreements(own, other, names)
        there = [condition for condition in _conditions(args) if condition.on_target]
        back = [condition for condition in _conditions(args) if not condition.on_target]
        outcomes = _measured(args, encoded, target, there, own=own, other=other, names=names)
        outcomes |= _measured(args, encoded_back, source, back, own=other, other=own, names=names)
        notes = [
            *members.notes,
            *source_members.notes,
            f"{len(names)} tensors; {len(wanted) - len(names)} more have no counterpart of their "
            f"shape. Kernels at a scale of {args.alpha:g}: target's of {', '.join(target.names)}; "
            f"source's of {', '.join(source.names)}.",
            *(f"Target: {method}" for method in encoded.notes),
            *(f"Source: {method}" for method in encoded_back.notes),
            *_NOTES,
            INTERVALS,
        ]
    titles = args.names or _family_names(members.base_name, source_members.base_name)
    records = [_condition_json(each, outcomes, titles) for each in _conditions(args)]
    document = {
        "conditions": records,
        "agreement": {name: asdict(found) for name, found in agreed.items()},
        "num_tensors": len(names),
        "alpha": args.alpha,
        "source": source_members.base_name,
    }
    tables = [*_tables(records), _agreement_table(agreed)]
    show(args, document, tables, notes, members=members, drawings=_drawings(records))
    return 0


def _conditions(args: argparse.Namespace) -> tuple[Condition, ...]:
    return FM_CONDITIONS if args.fm_only else (*FM_CONDITIONS, *BEYOND_FM)


def _measured(
    args: argparse.Namespace,
    encoded: EncodedSuite,
    family: StudiedFamily,
    conditions: Sequence[Condition],
    *,
    own: Side,
    other: Side,
    names: Sequence[str],
) -> dict[str, Outcome[Scores]]:
    """Returns the outcomes on one family's base."""
    device, dtype = chosen_device(args)
    model = StudyModel.open(family.base, device=device, dtype=dtype)
    outcomes: dict[str, Outcome[Scores]] = {}
    for key, outcome in measure_conditions(
        conditions,
        model,
        encoded.measure,
        own=own,
        other=other,
        names=names,
        alpha=args.alpha,
        seed=args.seed,
    ):
        _LOG.info("%s measured", key)
        outcomes[key] = outcome
    return outcomes


def _family_names(target: str, source: str) -> list[str]:
    """Returns how tables call the two families, whose bases often share a name."""
    return [target, source] if target != source else ["target", "source"]


def _condition_json(
    condition: Condition, outcomes: Mapping[str, Outcome[Scores]], titles: Sequence[str]
) -> dict[str, Any]:
    outcome = outcomes[condition.key]
    baseline = outcomes[_BASELINES[condition.on_target]].measured
    return {
        "key": condition.key,
        "title": condition.title(target=titles[0], source=titles[1]),
        "norm": outcome.norm,
        "baseline": _BASELINES[condition.on_target],
        "scores": outcome.measured.to_json(),
        "changes": changes(outcome.measured, baseline),
    }


def _tables(records: Sequence[Mapping[str, Any]]) -> list[Shown]:
    """Returns a table for each metric: side by side they would not fit."""
    return [
        Shown(
            f"Transfer between families (FM table 5): {METRICS[name]}",
            ("", "condition", "norm added", METRICS[name], "Δ"),
            [_row(record, name) for record in records],
        )
        for name in measured(records[0]["scores"])
    ]


def _drawings(records: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    changed = [record for record in records if record["key"] != record["baseline"]]
    return metric_drawings(
        {"change": [record["changes"] for record in changed]},
        x=[record["key"] for record in changed],
        x_title="condition",
        shape=Shape.BARS,
        what="Each condition against its base, as the tables name them",
    )


def _row(record: Mapping[str, Any], metric: str) -> list[Cell]:
    is_base = record["key"] == record["baseline"]
    change = None if is_base else change_cell(record["changes"][metric])
    value = value_cell(record["scores"], metric)
    return [record["key"], record["title"], record["norm"], value, change]


def _agreement_table(agreed: Mapping[str, Agreement]) -> Shown:
    return Shown(
        "Source kernel against the target's mean delta",
        ["", "tensors", "flipped", "mean cos", "rms cos", "rms cos by chance", "norm ratio"],
        [[name, *asdict(found).values()] for name, found in agreed.items()],
        ("By chance: of directions uniform over the sphere. Norm ratio: median of the target's "
         "mean delta over the source's kernel.",),
    )  # fmt: skip
