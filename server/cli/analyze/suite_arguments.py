"""What every study that measures models takes: files, how much of them, and where to compute."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from analysis.evaluation.instructions import DEFAULT_LIMIT
from analysis.evaluation.mmlu import LIMIT, SUBJECTS
from analysis.evaluation.perplexity import NUM_TOKENS, WINDOW, Protocol
from analysis.evaluation.suite import SuiteFiles
from analysis.model import usable_device

_PROTOCOLS = {
    "sliding": (Protocol.SLIDING,),
    "full": (Protocol.FULL,),
    "both": tuple(Protocol),
}


def add_suite_arguments(parser: argparse.ArgumentParser, *, protocol: str = "sliding") -> None:
    """Declares what is measured.

    Args:
        parser: Of a study.
        protocol: The default of --protocol.
    """
    group = parser.add_argument_group("what is measured")
    group.add_argument("--wikitext", type=Path, metavar="FILE", help="a text, for its perplexity")
    group.add_argument(
        "--protocol",
        choices=_PROTOCOLS,
        default=protocol,
        help="how the text is read: in windows that overlap, in sequences one after the other, or "
        f"both, which give different numbers (default {protocol})",
    )
    group.add_argument(
        "--tokens",
        type=int,
        default=NUM_TOKENS,
        help=f"of the text, at most (default {NUM_TOKENS})",
    )
    group.add_argument(
        "--window",
        type=int,
        default=WINDOW,
        help=f"tokens of a sliding window, at most the context (default {WINDOW})",
    )
    group.add_argument(
        "--stride", type=int, help="tokens from one window to the next (default half a window)"
    )
    group.add_argument(
        "--full-length",
        type=int,
        metavar="N",
        help="tokens of a full sequence (default the model's context)",
    )
    group.add_argument(
        "--instruct",
        type=Path,
        metavar="FILE",
        help="a JSON array in Alpaca's format, for instruction perplexity",
    )
    group.add_argument(
        "--records",
        type=int,
        default=DEFAULT_LIMIT,
        help=f"the last so many records of --instruct (default {DEFAULT_LIMIT})",
    )
    group.add_argument(
        "--mmlu", type=Path, metavar="DIR", help="a folder of SUBJECT_test.csv files, for MMLU"
    )
    group.add_argument(
        "--subjects", nargs="+", default=SUBJECTS, help="of MMLU (default FM's four)"
    )
    group.add_argument(
        "--tasks", type=Path, metavar="DIR", help="a folder of *.jsonl files with multiple choice"
    )
    group.add_argument(
        "--questions",
        type=int,
        default=LIMIT,
        help=f"the first so many of each subject and task (default {LIMIT})",
    )


def suite_files(args: argparse.Namespace) -> SuiteFiles:
    """Returns what `add_suite_arguments` took."""
    return SuiteFiles(
        wikitext=args.wikitext,
        instruct=args.instruct,
        mmlu=args.mmlu,
        tasks=args.tasks,
        subjects=tuple(args.subjects),
        protocols=_PROTOCOLS[args.protocol],
        num_tokens=args.tokens,
        window=args.window,
        stride=args.stride,
        full_length=args.full_length,
        num_instructions=args.records,
        num_questions=args.questions,
    )


def chosen_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Returns what `add_device_arguments` took.

    Raises:
        InvalidRequestError: There is no such device.
    """
    dtype: torch.dtype = getattr(torch, args.dtype)
    return usable_device(args.device), dtype
