"""Whether blocks that get small gradients are those that fine-tuning left alone (BS Q).

Legend: L layers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch

from analysis.evaluation.texts import first_tokens, read_text
from analysis.family import StudiedFamily
from analysis.model import StudyModel
from analysis.probes.correlation import Correlation, pearson, spearman
from analysis.probes.devices import CPU, add_device_argument, open_model
from analysis.probes.result import ProbeResult, Value
from linker_core.errors import InvalidRequestError
from linker_core.sharing.report import ScanReport
from linker_core.sharing.scan import scan
from linker_core.sharing.thresholds import CONSERVATIVE
from linker_core.tuning.dialogues import load_dialogues
from linker_core.weights.keys import parse_key

NUM_STRINGS = 12  # BS Q
MAX_STRING_TOKENS = 512
_NOTES = (
    "Correlations over the blocks of |g| / |θ|, the norm of the mean gradient of the base's loss "
    "over that of the block's weights, with 1 - cos of BS Eq. 1. depth_spearman is that of 1 - cos "
    "with the layer's number.",
    f"shared and rejected (BS table 17): cos ≥ {CONSERVATIVE.tau_cos} and ε ≤ "
    f"{CONSERVATIVE.tau_frob}. BS on Gemma-2-2B: -0.120 and -0.104, no relation.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the text that gradients come from."""
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="a text, one string a paragraph (default dialogues that ship with the tuner)",
    )
    parser.add_argument(
        "--strings",
        type=int,
        default=NUM_STRINGS,
        help=f"how many strings are read (default {NUM_STRINGS})",
    )
    add_device_argument(parser)


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Correlates gradients with what moved."""
    return measure(family, args.text, num_strings=args.strings, device=args.device)


def measure(
    family: StudiedFamily,
    text: Path | None = None,
    *,
    num_strings: int = NUM_STRINGS,
    device: str = CPU,
) -> ProbeResult:
    """Correlates the base's relative gradient norms with every variant's 1 - cos, over the blocks.

    Deviates from BS Q, which computes in bfloat16: gradients here are float32.

    Args:
        family: Base and variants.
        text: One string a paragraph; None for the shipped dialogues.
        num_strings: At most.
        device: Where the base is computed.

    Raises:
        InvalidRequestError: A text of no use, or no string asked for.
        LinkerError: A checkpoint that cannot be read or does not fit into memory.
    """
    if num_strings < 1:
        raise InvalidRequestError(
            f"--strings is {num_strings}, expected 1 or more.", param="strings"
        )
    chosen = _strings(text, num_strings)
    model = open_model(family.base, device)
    strings = _encoded(model, chosen)
    gradients = relative_gradients(model, strings)
    rows: list[tuple[Value, ...]] = []
    series: dict[str, Sequence[float]] = {"gradient": gradients}
    facts: dict[str, Value] = {"strings": len(strings)}
    for label, variant in family.variants.items():
        report = scan(family.base, variant)
        moved = [1 - block.cos for block in report.blocks]
        by_depth = spearman(range(len(moved)), moved)
        rows.append((
            label, len(moved), *_pair(pearson(gradients, moved)),
            *_pair(spearman(gradients, moved)), by_depth and by_depth.r,
        ))  # fmt: skip
        series[f"{label}: 1 - cos"] = moved
        facts |= {f"{label}: {name}": value for name, value in _groups(report, gradients)}
    return ProbeResult(
        title="Gradient norms of the base against what fine-tuning moved",
        columns=(
            "variant", "blocks", "pearson", "pearson_p", "spearman", "spearman_p", "depth_spearman",
        ),
        rows=tuple(rows),
        facts=facts,
        notes=_NOTES,
        series=series,
    )  # fmt: skip


def _groups(report: ScanReport, gradients: Sequence[float]) -> Iterator[tuple[str, Value]]:
    """Yields the facts of BS table 17: both groups' sizes and means."""
    shared = [block for block in report.blocks if CONSERVATIVE.shares(block)]
    rejected = [block for block in report.blocks if not CONSERVATIVE.shares(block)]
    for name, blocks in (("shared", shared), ("rejected", rejected)):
        yield f"{name} blocks", len(blocks)
        if blocks:
            yield f"gradient of {name}", fmean(gradients[block.index] for block in blocks)
            yield f"1 - cos of {name}", fmean(1 - block.cos for block in blocks)


def relative_gradients(model: StudyModel, strings: Sequence[Sequence[int]]) -> list[float]:
    """Returns |g_i| / |θ_i| of every layer i, [L].

    g is the gradient of the mean over strings of each one's mean loss. The model ends without
    gradients, as it began.
    """
    keys = {name: parse_key(name) for name in model.names}
    layers = {name: key.layer for name, key in keys.items() if key and key.layer is not None}
    parameters = {name: model.module.get_parameter(name) for name in layers}
    for parameter in parameters.values():
        parameter.requires_grad_()
    for ids in strings:
        loss = model.losses(torch.tensor([list(ids)])).mean() / len(strings)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own is not annotated
    squares = [[0.0, 0.0] for _ in range(model.config.num_layers)]
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        squares[layers[name]][0] += float(parameter.grad.double().square().sum())
        squares[layers[name]][1] += float(parameter.detach().double().square().sum())
        parameter.grad = None
        parameter.requires_grad_(False)
    return [math.sqrt(gradient / weights) for gradient, weights in squares]


def _strings(text: Path | None, count: int) -> list[str]:
    """Returns the first paragraphs of a file, or as many shipped dialogues, kinds in turn."""
    if text is not None:
        paragraphs = (part.strip() for part in read_text(text, param="text").split("\n\n"))
        return [paragraph for paragraph in paragraphs if paragraph][:count]
    dialogues = load_dialogues(None)
    step = max(1, len(dialogues) // count)
    return ["\n".join(turn.content for turn in dialogue.turns) for dialogue in dialogues[::step]][
        :count
    ]


def _encoded(model: StudyModel, strings: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of strings that have at least two.

    Raises:
        InvalidRequestError: None has.
    """
    limit = min(MAX_STRING_TOKENS, model.config.max_position_embeddings)
    encoded = [
        first_tokens(model.tokenizer, text, limit=limit, vocab_size=model.config.vocab_size)
        for text in strings
    ]
    long_enough = [ids for ids in encoded if len(ids) > 1]
    if not long_enough:
        raise InvalidRequestError("No string has two tokens, so none has a loss.", param="text")
    return long_enough


def _pair(found: Correlation | None) -> tuple[float | None, float | None]:
    return (None, None) if found is None else (found.r, found.p)
