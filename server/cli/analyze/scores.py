"""How scores read in a table: values beside their change from a baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from analysis.evaluation.token_loss import LEVEL

METRICS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "wikitext_sliding_window": "WikiText PPL, sliding",
        "wikitext_full_sequence": "WikiText PPL, full",
        "instruct_record": "instruct PPL, record",
        "instruct_response": "instruct PPL, response",
        "mmlu": "MMLU %",
        "tasks": "tasks %",
    }
)
DIVERGED: Final = "diverged"
INTERVALS: Final = (
    f"Brackets: {LEVEL:.0%} interval of the change, from windows or records paired between the two "
    "models. ±: standard error of the change in points, paired by question. Neither covers another "
    "choice of text, of fine-tunes or of seeds."
)


def measured(scores: Mapping[str, Any]) -> list[str]:
    """Returns the metrics that a record of `Scores.to_json` has."""
    return [name for name in METRICS if scores.get(name) is not None]


def value_cell(scores: Mapping[str, Any], name: str) -> float | str:
    """Returns a perplexity, infinite where the model diverged, or an accuracy in percent."""
    entry = scores[name]
    if "accuracy" in entry:
        accuracy = entry["accuracy"]
        return DIVERGED if accuracy is None else round(100 * float(accuracy), 1)
    value = entry["perplexity"]
    return math.inf if value is None else float(value)


def change_cell(change: Mapping[str, Any]) -> str:
    """Returns a change of `analysis.evaluation.sweep.changes` with its interval or error."""
    if change.get("points", change.get("percent")) is None:
        return DIVERGED
    if "points" in change:
        return f"{change['points']:+.1f} ± {change['stderr']:.1f}"
    if change["low"] is None or change["high"] is None:
        return f"{change['percent']:+.2f} %"
    return f"{change['percent']:+.2f} % [{change['low']:+.2f}, {change['high']:+.2f}]"
