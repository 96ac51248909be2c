"""Whether a variant's answers survive on the base's blocks (BS appendix O).

Greedy answers of the variant as it is against those of the variant whose transformer blocks are all
the base's; embedding, final norm and head stay its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from analysis.family import StudiedFamily
from analysis.probes.devices import CPU, add_device_argument, open_model
from analysis.probes.overlap import common_prefix, rouge_l
from analysis.probes.prompting import asked, encoded_prompts, prompts_of
from analysis.probes.result import ProbeResult, Value
from linker_core.errors import InvalidRequestError, LinkerError
from linker_core.tuning.dialogues import Dialogue, load_dialogues
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import Section, parse_key

NUM_PROMPTS, NUM_TOKENS = 12, 64  # BS O: 12 diverse prompts; it states no length of the answers
_MAX_PROMPTS, _MAX_TOKENS = 1000, 4096
_NOTES = (
    "Reference: the variant's own greedy answers; candidate: those of the variant with the base's "
    "blocks. Prompts stand in the variant's chat format.",
    "bleu: corpus BLEU of sacrebleu (13a tokens, exponential smoothing), over 100; rouge_l: mean "
    "F1 of the longest common subsequence of words; exact_answers: share of answers that are equal "
    "token by token; equal_tokens: share of positions with equal tokens; first_differs: mean "
    "number of tokens before the first difference. BS's own variants of BLEU and ROUGE are not "
    "stated, so its 0.50 / 0.42 (Qwen2.5-3B) and 0.44 / 0.23 (Mistral-7B) may be on other scales.",
)


class Overlap(NamedTuple):
    """How alike the answers of one variant are."""

    bleu: float
    rouge_l: float
    exact_answers: float
    equal_tokens: float
    first_differs: float


COLUMNS = ("variant", "prompts", *Overlap._fields)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares prompts and answers."""
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON lines, "text" or {"prompt": "text"} each (default dialogues that ship with '
        "the tuner)",
    )
    parser.add_argument(
        "--num-prompts",
        type=int,
        default=NUM_PROMPTS,
        help=f"how many are asked, at most (default {NUM_PROMPTS})",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=NUM_TOKENS, help=f"of an answer (default {NUM_TOKENS})"
    )
    add_device_argument(parser)


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Compares the answers of every variant."""
    return measure(
        family,
        args.prompts,
        num_prompts=args.num_prompts,
        max_tokens=args.max_tokens,
        device=args.device,
    )


def measure(
    family: StudiedFamily,
    prompts: Path | None = None,
    *,
    num_prompts: int = NUM_PROMPTS,
    max_tokens: int = NUM_TOKENS,
    device: str = CPU,
) -> ProbeResult:
    """Compares the answers of every variant with and without its own blocks.

    Args:
        family: Base and variants, one of them in memory at a time.
        prompts: JSON lines; None for the first of the shipped dialogues.
        num_prompts: At most.
        max_tokens: Of an answer.
        device: Where models are computed.

    Raises:
        InvalidRequestError: A number out of bounds, prompts of no use, or no such device.
        LinkerError: sacrebleu is not installed, or a checkpoint cannot be read.
    """
    if not (1 <= num_prompts <= _MAX_PROMPTS and 1 <= max_tokens <= _MAX_TOKENS):
        raise InvalidRequestError(
            f"{num_prompts} prompts and {max_tokens} tokens were asked for, expected 1 to "
            f"{_MAX_PROMPTS} and 1 to {_MAX_TOKENS}."
        )
    _bleu([""], [""])  # without sacrebleu all answers would be for nothing
    dialogues = _dialogues(prompts, num_prompts)
    rows: list[tuple[Value, ...]] = []
    for name, checkpoint in family.variants.items():
        model = open_model(checkpoint, device)
        asked_ids = encoded_prompts(model, dialogues, room=max_tokens)
        own = [model.greedy(ids, max_tokens=max_tokens) for ids in asked_ids]
        model.adopt(family.base, block_tensors(checkpoint))
        shared = [model.greedy(ids, max_tokens=max_tokens) for ids in asked_ids]
        texts = [[model.tokenizer.decode(ids) for ids in answers] for answers in (own, shared)]
        rows.append((name, len(dialogues), *overlap(own, shared, *texts)))
    facts: dict[str, Value] = {
        f"mean_{column}": fmean(float(row[COLUMNS.index(column)] or 0) for row in rows)
        for column in ("bleu", "rouge_l", "exact_answers")
    }
    return ProbeResult(
        title="Greedy answers with and without the base's blocks",
        columns=COLUMNS,
        rows=tuple(rows),
        facts=facts,
        notes=_NOTES,
    )


def block_tensors(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of a checkpoint's tensors that belong to blocks."""
    return [
        name
        for name in checkpoint.tensors
        if (key := parse_key(name)) is not None and key.section is Section.BLOCKS
    ]


def overlap(
    own: Sequence[Sequence[int]],
    shared: Sequence[Sequence[int]],
    own_texts: Sequence[str],
    shared_texts: Sequence[str],
) -> Overlap:
    """Returns how alike answers are, as tokens and as texts.

    Raises:
        LinkerError: sacrebleu is not installed.
    """
    pairs = list(zip(own, shared, strict=True))
    texts = list(zip(own_texts, shared_texts, strict=True))
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    positions = sum(max(len(a), len(b)) for a, b in pairs)
    return Overlap(
        bleu=_bleu(own_texts, shared_texts),
        rouge_l=fmean(rouge_l(reference, candidate) for reference, candidate in texts),
        exact_answers=fmean(float(list(a) == list(b)) for a, b in pairs),
        equal_tokens=equal / positions if positions else 1.0,
        first_differs=fmean(common_prefix(a, b) for a, b in pairs),
    )


def _bleu(references: Sequence[str], candidates: Sequence[str]) -> float:
    try:
        from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise LinkerError(
            "BLEU needs sacrebleu. Install it with pip install 'linker-llm[bleu]'."
        ) from error
    return float(BLEU().corpus_score(list(candidates), [list(references)]).score) / 100


def _dialogues(prompts: Path | None, num_prompts: int) -> list[Dialogue]:
    if prompts is not None:
        return asked(prompts_of(prompts, param="prompts", limit=num_prompts))
    shipped = [dialogue for dialogue in load_dialogues(None) if not dialogue.plain]
    return sorted(shipped, key=lambda dialogue: dialogue.digest)[:num_prompts]
