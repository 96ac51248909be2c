"""A user's text as token sequences of one length.

Legend: S sequences, T tokens of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from analysis.evaluation.texts import MAX_TOKENS, first_tokens, read_text
from analysis.probes.devices import add_device_argument
from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.checkpoint import Checkpoint


def add_sequence_arguments(
    parser: argparse.ArgumentParser, *, num_sequences: int, num_tokens: int
) -> None:
    """Declares the text, how much of it is read, and where models are computed."""
    parser.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="a text, such as WikiText-2's test"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=num_sequences,
        help=f"how many are read, from the text's beginning (default {num_sequences})",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=num_tokens,
        help=f"of each sequence, at most the model's context (default {num_tokens})",
    )
    add_device_argument(parser)


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """The beginning of a text, in sequences; each model reads it with its own tokenizer."""

    path: Path  # UTF-8
    num_sequences: int  # S at most
    num_tokens: int  # T, unless a model's context is shorter

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Returns what `add_sequence_arguments` declares."""
        return cls(path=args.text, num_sequences=args.sequences, num_tokens=args.tokens)

    @property
    def words(self) -> str:
        """What is read and how it is computed, for a reader."""
        return (
            f"At most {self.num_sequences} sequences of {self.num_tokens} tokens of "
            f"{self.path.name}, float32."
        )

    def read_by(self, checkpoints: Mapping[str, Checkpoint]) -> dict[str, torch.Tensor]:
        """Returns what each of several models reads, before any of them is loaded; see `read`."""
        return {name: self.read(checkpoint) for name, checkpoint in checkpoints.items()}

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Returns the sequences in a model's tokens, [S, T]; fewer where the text is shorter.

        Raises:
            InvalidRequestError: The text cannot be read or holds no sequence, or a number is out
                of bounds.
        """
        length = min(self.num_tokens, checkpoint.config.max_position_embeddings)
        if length < 2 or self.num_sequences < 1 or self.num_sequences * length > MAX_TOKENS:
            raise InvalidRequestError(
                f"{self.num_sequences} sequences of {self.num_tokens} tokens were asked for; "
                f"expected at least one of two, and at most {MAX_TOKENS} tokens."
            )
        ids = first_tokens(
            Tokenizer.load(checkpoint.path),
            read_text(self.path, param="text"),
            limit=self.num_sequences * length,
            vocab_size=checkpoint.config.vocab_size,
        )
        count = len(ids) // length
        if count == 0:
            raise InvalidRequestError(
                f"--text {self.path.name} has {len(ids)} tokens, fewer than one sequence of "
                f"{length}. Give a longer text, or --tokens.",
                param="text",
            )
        return torch.tensor(ids[: count * length]).view(count, length)
