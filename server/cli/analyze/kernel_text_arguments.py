"""What `linker analyze kernel` takes to measure kernels on texts: the arguments alone, no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from linker_core.errors import InvalidRequestError

_TOKENS = 4_000
_MAX_TOKENS = 1 << 20
_TEMPERATURE = 0.005
_MAX_STEPS = 100_000


def add_text_arguments(parser: argparse._ActionsContainer) -> None:
    """Declares texts, specialists, and the measured chain."""
    parser.add_argument(
        "--texts",
        nargs="+",
        default=(),
        metavar="LABEL=FILE",
        help="JSON lines on which the base with the kernel is measured, "
        '{"messages": […]} or {"text": …} a line',
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=_TOKENS,
        metavar="N",
        help=f"how many of each text are measured (default {_TOKENS})",
    )
    parser.add_argument(
        "--compose",
        nargs="+",
        default=(),
        metavar="LABEL=VARIANT,…",
        help="specialists, each the kernel of the fine-tunes named: the cosines between them, and "
        "with --texts what their sum does",
    )
    parser.add_argument(
        "--capability",
        type=int,
        metavar="STEPS",
        help="sample the weights by the mean loss on --texts, for so many steps after a fifth "
        "more that do not count",
    )
    parser.add_argument(
        "--capability-temperature",
        type=float,
        default=_TEMPERATURE,
        metavar="T",
        help=f"T of exp(-loss / T), in nats per token (default {_TEMPERATURE:g})",
    )


def check_text_arguments(args: argparse.Namespace) -> None:
    """Refuses numbers out of range.

    Raises:
        InvalidRequestError: See above.
    """
    steps, temperature = args.capability, args.capability_temperature
    if not 2 <= args.tokens <= _MAX_TOKENS:
        raise InvalidRequestError(
            f"--tokens is {args.tokens}, expected 2 to {_MAX_TOKENS}.", param="tokens"
        )
    if steps is not None and not 1 <= steps <= _MAX_STEPS:
        raise InvalidRequestError(
            f"--capability is {steps}, expected 1 to {_MAX_STEPS}.", param="capability"
        )
    if steps is not None and not args.texts:
        raise InvalidRequestError("--capability measures texts: give --texts.", param="texts")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidRequestError(
            f"--capability-temperature is {temperature:g}, expected a number above 0.",
            param="capability_temperature",
        )


def labelled(entries: Sequence[str], option: str) -> dict[str, str]:
    """Returns label -> value of LABEL=VALUE entries.

    Raises:
        InvalidRequestError: An entry is none, or two have one label.
    """
    found: dict[str, str] = {}
    for entry in entries:
        label, equals, value = entry.partition("=")
        if not (equals and label and value):
            raise InvalidRequestError(
                f"--{option} {entry!r:.80} is not of the form LABEL=VALUE.", param=option
            )
        if label in found:
            raise InvalidRequestError(f"--{option} names {label!r:.60} twice.", param=option)
        found[label] = value
    return found
