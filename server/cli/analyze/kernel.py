"""`linker analyze kernel BASE VARIANT …`: FM's kernel, beside uniform weights, and its export."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from analysis.family import StudiedFamily
from analysis.gram import TensorGram, gram_pass
from analysis.kernel.compose import Composition
from analysis.kernel.consensus import Mean
from analysis.kernel.export import check_scale, export_kernel
from analysis.kernel.kernel import Kernel, build_kernel, check_several
from analysis.kernel.metropolis import TEMPERATURE
from analysis.kernel.robust import STRATEGIES
from analysis.seed import check_seed
from linker_core.errors import InvalidRequestError
from linker_core.residency.new_folder import check_target
from server.cli.analyze import kernel_tables as tables
from server.cli.analyze.device_arguments import add_device_arguments
from server.cli.analyze.kernel_composed import check_composed, composed, composition
from server.cli.analyze.kernel_text_arguments import add_text_arguments, check_text_arguments
from server.cli.analyze.members import (
    Members,
    add_member_arguments,
    add_tensor_arguments,
    find_members,
    selected,
)
from server.cli.analyze.output import Shown, add_output_arguments, show
from server.cli.analyze.studying import unchanged_notes
from server.cli.progress import byte_progress

# Measures a kernel and what was composed: yields place in the document, JSON and tables.
Measuring = Callable[
    [Kernel, Composition | None], Iterable[tuple[str, dict[str, Any], list[Shown]]]
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's arguments."""
    add_member_arguments(parser, least=2)
    add_tensor_arguments(parser)
    add_kernel_arguments(parser)
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="write base + alpha K as a model"
    )
    parser.add_argument("--alpha", type=float, default=1.0, help="of the export (1)")
    add_text_arguments(parser.add_argument_group("measured on texts"))
    add_device_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Builds, prints, and exports if asked to; stdout holds one JSON document under --json."""
    check_text_arguments(args)
    check_kernel_arguments(args)
    if args.export is not None:  # a chain on texts may take hours before it is written
        check_scale(args.alpha)
        if not args.export.parent.is_dir():  # beside `check_target`, which says no path
            raise InvalidRequestError(
                f"--export {args.export}: there is no folder {args.export.parent}. "
                "Name a folder in one that exists.",
                param="export",
            )
        check_target(args.export)
    members = find_members(args, least=2)
    check_several(tuple(members.variants))
    check_composed(args, tuple(members.variants))
    if args.export is not None:
        _check_outside(args.export, members)
    with members.open() as family:
        names = selected(args, family)
        measured = _measuring(args, family)
        with byte_progress("reading") as progress:
            grams = list(gram_pass(family, names, progress=progress))
        kernel = kernel_of(args, family.names, grams)
        document, shown = _kernel(args, members.base_name, kernel, grams)
        together = composed(args, family.names, grams) if args.compose else None
        if together is not None:
            document["composition"], cosines = composition(args, together)
            shown.append(cosines)
        for key, record, found in measured(kernel, together):
            document[key] = document.get(key, {}) | record
            shown += found
        unchanged = unchanged_notes(family.names, [gram.norms_N.tolist() for gram in grams])
        document["notes"] = [*members.notes, *unchanged, *tables.notes(kernel)]
        _show_and_export(args, family, kernel, document, shown)
    return 0


def _check_outside(target: Path, members: Members) -> None:
    """Refuses to write into a model that is read.

    Raises:
        InvalidRequestError: See above.
    """
    for folder in (members.base, *members.variants.values()):
        if target.resolve().is_relative_to(folder.resolve()):
            raise InvalidRequestError(
                f"--export {target} lies in {folder}, a model that is read. Name a folder outside.",
                param="export",
            )


def _measuring(args: argparse.Namespace, family: StudiedFamily) -> Measuring:
    """Reads --texts; returns what measures kernels on them."""
    if not args.texts:
        return lambda _kernel, _together: ()
    from server.cli.analyze import kernel_measured  # noqa: PLC0415 - brings torch along, here alone
    from server.cli.analyze.kernel_texts import read_texts  # noqa: PLC0415
    from server.cli.analyze.suite_arguments import chosen_device  # noqa: PLC0415

    chosen_device(args)
    return partial(kernel_measured.on_texts, args, family, read_texts(args, family.base))


def _show_and_export(
    args: argparse.Namespace,
    family: StudiedFamily,
    kernel: Kernel,
    document: dict[str, Any],
    shown: Sequence[Shown],
) -> None:
    """Prints what was found, which may have taken hours, also where the export then fails."""
    notes = document["notes"]
    if args.export is None:
        show(args, document, shown, notes)
    elif args.json:
        try:
            notes.append(_exported(args, family, kernel))
            document["export"] = {"path": str(args.export), "alpha": args.alpha}
        finally:
            show(args, document, shown)
    else:
        show(args, document, shown, notes)
        show(args, {}, [], [_exported(args, family, kernel)])


def _exported(args: argparse.Namespace, family: StudiedFamily, kernel: Kernel) -> str:
    """Writes the model; returns what is said of it."""
    with byte_progress("writing") as progress:
        export_kernel(family, kernel, args.export, scale=args.alpha, progress=progress)
    return f"Wrote {args.export}: base + {args.alpha:g} · K, ready to be onboarded."


def _kernel(
    args: argparse.Namespace, base_name: str, kernel: Kernel, grams: Sequence[TensorGram]
) -> tuple[dict[str, Any], list[Shown]]:
    """Returns the kernel beside its companions, as JSON and as tables."""
    uniform = kernel.uniform()
    found = tables.strategies(grams, whole_model=args.whole_model)
    document = {
        "base": base_name,
        "kernel": kernel.to_json(),
        "uniform": {"weight": uniform.mean_weight, "norm": uniform.norm},
        "raw_mean": {"norm": kernel.raw_mean().norm},
        "strategies": found,
        "export": None,
    }
    shown = [tables.component_table(kernel), tables.layer_table(kernel)]
    shown.append(tables.strategy_table(found, kernel.names))
    return document, [table for table in shown if table is not None]


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares how a kernel is built."""
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default=Mean.name,
        help="which consensus of the deltas (mean, FM Eq. 4)",
    )
    parser.add_argument(
        "--whole-model",
        action="store_true",
        help="weigh a fine-tune alike in all tensors, by all of them together",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        help=f"T of exp(score / T); colder tells tensors apart more ({TEMPERATURE:g})",
    )
    parser.add_argument(
        "--uncentred", action="store_true", help="score by PC1 without taking the mean off"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")


def check_kernel_arguments(args: argparse.Namespace) -> None:
    """Refuses a temperature or a seed that no chain can run with.

    Raises:
        InvalidRequestError: See above.
    """
    check_seed(args.seed)
    if not (math.isfinite(args.temperature) and args.temperature > 0):
        raise InvalidRequestError(
            f"--temperature is {args.temperature:g}, expected a number above 0.",
            param="temperature",
        )


def kernel_of(
    args: argparse.Namespace, names: tuple[str, ...], grams: Iterable[TensorGram]
) -> Kernel:
    """Builds the kernel that `add_kernel_arguments` describes, once they are checked.

    Raises:
        InvalidRequestError: There is one fine-tune.
    """
    return build_kernel(
        grams,
        names=names,
        seed=args.seed,
        strategy=STRATEGIES[args.strategy](),
        temperature=args.temperature,
        centred=not args.uncentred,
        whole_model=args.whole_model,
    )
