"""One pass over a family and the study of every tensor: what three of the commands begin with."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.record import TensorStudy
from analysis.seed import check_seed
from analysis.study import NUM_DRAWS, study_tensor
from analysis.summary import summarise
from linker_core.errors import InvalidRequestError
from server.cli.analyze.members import (
    Members,
    add_member_arguments,
    add_tensor_arguments,
    selected,
)
from server.cli.analyze.output import add_output_arguments
from server.cli.progress import byte_progress

MIN_DRAWS, MAX_DRAWS = 19, 100_000  # with fewer, no p-value can reach 5 %


class Studied(NamedTuple):
    """A family's studies."""

    members: Members
    studies: list[TensorStudy]

    @property
    def notes(self) -> list[str]:
        """What was left out, and what had better be."""
        norms = (study.norms for study in self.studies)
        return [*self.members.notes, *unchanged_notes(self.names, norms)]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.members.variants)

    def summary(
        self, args: argparse.Namespace, *, kl_to_base: dict[str, float] | None = None
    ) -> dict[str, Any]:
        """Returns the summary; see `summarise`."""
        return summarise(
            self.studies,
            base=self.members.base_name,
            names=self.names,
            seed=args.seed,
            num_draws=args.draws,
            kl_to_base=kl_to_base,
        )


def add_study_arguments(parser: argparse.ArgumentParser, *, least: int = 1) -> None:
    """Declares the models, the tensors, the seed, the number of draws, and --json."""
    add_member_arguments(parser, least=least)
    add_tensor_arguments(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the null's and the bootstrap's draws (default 0)"
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=NUM_DRAWS,
        help=f"of null and bootstrap, for each tensor (default {NUM_DRAWS}, at least {MIN_DRAWS})",
    )
    add_output_arguments(parser)


def check_draws(args: argparse.Namespace) -> None:
    """Refuses a seed or a number of draws that cannot be worked with.

    Raises:
        InvalidRequestError: See above.
    """
    check_seed(args.seed)
    if not MIN_DRAWS <= args.draws <= MAX_DRAWS:
        raise InvalidRequestError(
            f"--draws is {args.draws}, expected {MIN_DRAWS} to {MAX_DRAWS}: with fewer than "
            f"{MIN_DRAWS} no p-value reaches 5 %.",
            param="draws",
        )


def check_number(members: Members, *, least: int, why: str) -> None:
    """Refuses a family with too few fine-tunes, before anything is read.

    Raises:
        InvalidRequestError: Says why, and what helps.
    """
    if len(members.variants) < least:
        number = len(members.variants)
        raise InvalidRequestError(
            f"{members.base_name} has {number} fine-tune{'' if number == 1 else 's'} here: {why}. "
            "Name more."
        )


def unchanged_notes(names: Sequence[str], norms: Iterable[Sequence[float]]) -> list[str]:
    """Returns what is said of fine-tunes that have the base's very weights.

    Args:
        names: Of the fine-tunes.
        norms: |Δi| of each of them, tensor by tensor.
    """
    return [
        f"{name} has the base's very weights in all tensors studied. It is counted all the same; "
        "leave it out to see what the others have in common."
        for name, of_one in zip(names, zip(*norms, strict=True), strict=True)
        if not any(of_one)
    ]


def study_family(args: argparse.Namespace, members: Members, family: StudiedFamily) -> Studied:
    """Reads the family once and studies every tensor that was asked for."""
    with byte_progress("reading") as progress:
        studies = [
            study_tensor(gram, names=family.names, seed=args.seed, num_draws=args.draws)
            for gram in gram_pass(family, selected(args, family), progress=progress)
        ]
    return Studied(members, studies)
