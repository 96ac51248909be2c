"""`linker analyze kernel BASE VARIANT …`: FM's kernel, beside uniform weights, and its export."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from analysis.family import StudiedFamily
from analysis.gram import TensorGram, gram_pass
from analysis.kernel.compose import Composition
from analysis.kernel.consensus import Mean
from analysis.kernel.kernel import Kernel, build_kernel, check_several
from analysis.kernel.metropolis import TEMPERATURE
from analysis.kernel.robust import STRATEGIES
from analysis.seed import check_seed
from linker_core.errors import InvalidRequestError
from server.cli.analyze import kernel_tables as tables
from server.cli.analyze.device_arguments import add_device_arguments
from server.cli.analyze.kernel_composed import check_composed, composed, composition
from server.cli.analyze.kernel_export import (
    add_export_arguments,
    check_export,
    check_outside,
    exported,
)
from server.cli.analyze.kernel_found import Found, Part
from server.cli.analyze.kernel_text_arguments import add_text_arguments, check_text_arguments
from server.cli.analyze.members import (
    Members,
    add_member_arguments,
    add_tensor_arguments,
    find_members,
    selected,
)
from server.cli.analyze.output import add_output_arguments, show
from server.cli.analyze.studying import unchanged_notes
from server.cli.progress import byte_progress

Measuring = Callable[[Kernel, Composition | None], Iterable[Part]]
EXAMPLE = """\
linker analyze kernel models/base models/chat models/math \\
    --export models/base-kernel --alpha 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's arguments."""
    add_member_arguments(parser, least=2)
    add_tensor_arguments(parser)
    add_kernel_arguments(parser)
    add_export_arguments(parser)
    add_text_arguments(parser.add_argument_group("measured on texts"))
    add_device_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Builds, prints, and exports if asked to; stdout holds one JSON document under --json."""
    members = _checked(args)
    with members.open() as family:
        names = selected(args, family)
        measured = _measuring(args, family)
        with byte_progress("reading") as progress:
            grams = list(gram_pass(family, names, progress=progress))
        kernel = kernel_of(args, family.names, grams)
        found = _found(args, members, kernel, grams)
        together = composed(args, family.names, grams) if args.compose else None
        if together is not None:
            found.document["composition"], cosines = composition(args, together)
            found.tables.append(cosines)
        for part in measured(kernel, together):
            part.join(found)
        _show_and_export(args, family, members, kernel, found)
    return 0


def _checked(args: argparse.Namespace) -> Members:
    """Returns the family, once all is checked that needs no weight."""
    check_text_arguments(args)
    check_kernel_arguments(args)
    check_export(args)
    members = find_members(args, least=2)
    check_several(tuple(members.variants))
    check_composed(args, tuple(members.variants))
    check_outside(args, members)
    return members


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
    members: Members,
    kernel: Kernel,
    found: Found,
) -> None:
    """Prints what was found, which may have taken hours, also where the export then fails."""
    said = partial(
        show, args, found.document, found.tables, found.notes, members=members,
        drawings=found.drawings,
    )  # fmt: skip
    if args.export is None:
        said()
    elif args.json:
        try:
            exported(args, family, kernel)
            found.document["export"] = {"path": str(args.export), "alpha": args.alpha}
        finally:
            said()
    else:
        said()
        show(args, {}, [], [exported(args, family, kernel)])


def _found(
    args: argparse.Namespace, members: Members, kernel: Kernel, grams: Sequence[TensorGram]
) -> Found:
    """Returns the kernel beside its companions."""
    uniform = kernel.uniform()
    strategies = tables.strategies(grams, whole_model=args.whole_model)
    document = {
        "base": members.base_name,
        "kernel": kernel.to_json(),
        "uniform": {"weight": uniform.mean_weight, "norm": uniform.norm},
        "raw_mean": {"norm": kernel.raw_mean().norm},
        "strategies": strategies,
        "export": None,
    }
    shown = [tables.component_table(kernel), tables.layer_table(kernel)]
    shown.append(tables.strategy_table(strategies, kernel.names))
    unchanged = unchanged_notes(kernel.names, [gram.norms_N.tolist() for gram in grams])
    return Found(
        document=document,
        tables=[table for table in shown if table is not None],
        drawings=tables.drawings(kernel, strategies),
        notes=[*members.notes, *unchanged, *tables.notes(kernel)],
    )


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares how a kernel is built."""
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default=Mean.name,
        help="how the consensus of the deltas is found (default mean, FM Eq. 4)",
    )
    parser.add_argument(
        "--whole-model",
        action="store_true",
        help="give a fine-tune one coefficient in all tensors, found from all of them together",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        help=f"T of exp(score / T); colder tells tensors apart more (default {TEMPERATURE:g})",
    )
    parser.add_argument(
        "--uncentred",
        action="store_true",
        help="score by PC1 of the deltas as they are, without taking their mean off",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")


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
