"""`linker analyze warm-start`: fine-tuning from base, base + kernel and base + noise (FM §5.5)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from analysis.drawing import Drawing, Shape
from analysis.evaluation.sweep import check_scales
from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.kernel.kernel import check_several
from analysis.model import StudyModel
from analysis.training import LossCurve, Recipe, in_batches
from analysis.training_text import read_training_text
from analysis.transfer.conditions import Condition, Form, delta_of, matching_tensors
from analysis.transfer.side import Side
from analysis.warm_start import (
    BASE,
    Estimate,
    Start,
    StartResult,
    added,
    added_noise,
    compare_starts,
    estimate,
)
from linker_core.errors import InvalidRequestError
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
from server.cli.analyze.suite_arguments import chosen_device

_LOG = logging.getLogger(__name__)
_MAX_SEEDS = 100
_MAX_TOKENS = 1 << 20
_HELD_OUT_TOKENS = 4_000
_DEFAULTS = Recipe()
EXAMPLE = """\
linker analyze warm-start models/base models/chat models/math \\
    --train train.jsonl --held-out held-out.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's arguments."""
    add_member_arguments(parser, least=2)
    add_tensor_arguments(parser)
    rows = '{"messages": […]} or {"text": …} a line'
    parser.add_argument(
        "--train",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"JSON lines to train on, {rows}",
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines of the same kind to measure on, which nothing was trained on",
    )
    add_second_family(parser, "--source", purpose="start from its kernel, too, raw and aligned")
    add_kernel_arguments(parser)
    parser.add_argument("--alpha", type=float, default=1.0, help="scale of the kernel (default 1)")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each start, from --seed on (default 3)"
    )
    parser.add_argument(
        "--steps", type=int, default=_DEFAULTS.steps, help="optimiser steps of a run (default 60)"
    )
    parser.add_argument(
        "--batch", type=int, default=_DEFAULTS.batch, help="rows of a step (default 8)"
    )
    parser.add_argument(
        "--rate", type=float, default=_DEFAULTS.rate, help="learning rate of AdamW (default 3e-4)"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=5,
        help="steps between two measurements of the held-out loss (default 5)",
    )
    parser.add_argument(
        "--held-out-tokens",
        type=int,
        default=_HELD_OUT_TOKENS,
        metavar="N",
        help=f"learnt tokens of --held-out to measure on (default {_HELD_OUT_TOKENS})",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="of a row; longer ones are cut (default 512)"
    )
    add_device_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains from every start, seed by seed, and prints what each start is worth."""
    recipe = _recipe(args)
    check_kernel_arguments(args)
    device, dtype = chosen_device(args)
    named = [args.models] if args.source is None else [args.models, args.source]
    members, *sources = find_families(args, named, least=2)
    for each in (members, *sources):
        check_several(tuple(each.variants))
    with ExitStack() as opened:
        family = opened.enter_context(members.open())
        names = selected(args, family)
        others = [opened.enter_context(source.open()) for source in sources]
        matching = [matching_tensors(family.base, source.base, names) for source in others]
        read = partial(read_training_text, family.base, max_tokens=args.max_tokens)
        train = read(args.train)
        held_out = read(args.held_out, enough_tokens=args.held_out_tokens)
        own = _side(args, family, names)
        starts = _own_starts(names, own, args.alpha)
        for source, shared in zip(others, matching, strict=True):
            starts |= _source_starts(source, shared, own, args)
        results = compare_starts(
            StudyModel.open(family.base, device=device, dtype=dtype),
            starts,
            train,
            in_batches(held_out, recipe.batch),
            recipe,
            seeds=range(args.seed, args.seed + args.seeds),
            measure_every=args.every,
            on_run=_tell,
        )
    left_out = [note for each in (members, *sources) for note in each.notes]
    notes = [*left_out, *_notes(args, recipe, family.names)]
    document = {
        "kernel_of": list(family.names),
        "alpha": args.alpha,
        "recipe": asdict(recipe),
        "seeds": args.seeds,
        "starts": {name: result.to_json() for name, result in results.items()},
    }
    drawings = [_curves(results)]
    show(args, document, _tables(results), notes, members=members, drawings=drawings)
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    """Returns how each run trains, once the other numbers are sensible.

    Raises:
        InvalidRequestError: A number is out of its range.
    """
    check_scales([args.alpha], option="alpha")
    if args.dtype != "float32":
        raise InvalidRequestError(
            f"--dtype is {args.dtype}, whose rounding is larger than a step of training; train in "
            "float32.",
            param="dtype",
        )
    recipe = Recipe(steps=args.steps, batch=args.batch, rate=args.rate)
    for name, value, high in (
        ("seeds", args.seeds, _MAX_SEEDS),
        ("every", args.every, recipe.steps),
        ("max-tokens", args.max_tokens, _MAX_TOKENS),
        ("held-out-tokens", args.held_out_tokens, _MAX_TOKENS),
    ):
        if not 1 <= value <= high:
            raise InvalidRequestError(f"--{name} is {value}, expected 1 to {high}.", param=name)
    return recipe


def _side(args: argparse.Namespace, family: StudiedFamily, names: Sequence[str]) -> Side:
    return Side.of(family, kernel_of(args, family.names, gram_pass(family, names)))


def _own_starts(names: Sequence[str], own: Side, alpha: float) -> dict[str, Start]:
    put = delta_of(Condition(key="", crossed=False), own=own, other=own, alpha=alpha)
    return {"base + kernel": added(names, put), "base + noise": added_noise(names, put)}


def _source_starts(
    source: StudiedFamily, matching: Sequence[str], own: Side, args: argparse.Namespace
) -> dict[str, Start]:
    """Returns the starts at another family's kernel, as it is and aligned, in shared tensors."""
    other = _side(args, source, matching)
    starts: dict[str, Start] = {}
    for form in (Form.RAW, Form.ALIGNED):
        condition = Condition(key=form, crossed=True, form=form)
        put = delta_of(condition, own=own, other=other, alpha=args.alpha)
        starts[f"base + source kernel ({form})"] = added(matching, put)
    return starts


def _tell(start: str, seed: int, curve: LossCurve) -> None:
    losses = [f"{loss:.4f}" for _, loss in sorted(curve.measured.items())]
    _LOG.info("seed %d, %s: held-out loss %s", seed, start, ", ".join(losses))


def _tables(results: Mapping[str, StartResult]) -> list[Shown]:
    losses: list[tuple[Cell, ...]] = []
    speed: list[tuple[Cell, ...]] = []
    for name, result in results.items():
        gains = (result.last_gain, result.area_gain)
        last, area = (None if name == BASE else _with_interval(gain) for gain in gains)
        reached = [steps for steps in result.steps_to_base if steps is not None]
        arrival = sum(reached) / len(reached) if reached else None
        runs = f"{len(reached)} of {len(result.steps_to_base)}"
        losses.append((name, result.first.mean, result.last.mean, last))
        speed.append((name, result.area.mean, area, arrival, runs))
    return [
        Shown(
            "Held-out loss in nats per token",
            ("start", "before", "after", "less than from base"),
            losses,
        ),
        Shown(
            "Its mean over the run, and steps to the loss at which base ends",
            ("start", "mean loss", "less than from base", "steps", "in runs"),
            speed,
        ),
    ]


def _curves(results: Mapping[str, StartResult]) -> Drawing:
    """Returns the held-out losses over the steps, means over seeds."""
    steps = sorted(results[BASE].curves[0].measured)
    found = {
        name: [estimate([curve.measured[step] for curve in result.curves]) for step in steps]
        for name, result in results.items()
    }
    return Drawing(
        caption="Held-out loss while training from each start: means over seeds, with Student's "
        "95 % intervals over them.",
        shape=Shape.CURVES,
        x_title="step",
        y_title="nats per token",
        x=steps,
        series={name: [one.mean for one in losses] for name, losses in found.items()},
        intervals={name: [_ends(one) for one in losses] for name, losses in found.items()},
    )


def _ends(found: Estimate) -> tuple[float, float] | None:
    return None if found.low is None or found.high is None else (found.low, found.high)


def _with_interval(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _notes(args: argparse.Namespace, recipe: Recipe, fine_tunes: Sequence[str]) -> list[str]:
    return [
        f"The kernel is of {', '.join(fine_tunes)}, at a scale of {args.alpha:g}. Name no variant "
        "that was trained on the same text, or the start has seen the answers.",
        f"AdamW, every weight, {recipe.steps} steps of {recipe.batch} rows, rate {recipe.rate:g}; "
        f"{args.seeds} seeds of the rows' order (and of the noise), the same rows for every start.",
        "Intervals are Student's at 95 % over seeds, of differences to the base seed by seed: they "
        "say nothing of other texts, bases or kernels.",
    ]
