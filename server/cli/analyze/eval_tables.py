"""How `linker analyze eval` shows its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from analysis.drawing import Drawing, Shape
from analysis.evaluation.outputs import Output
from analysis.evaluation.sweep import Condition, changes
from server.cli.analyze.output import Cell, Shown
from server.cli.analyze.score_drawings import metric_drawings
from server.cli.analyze.scores import INTERVALS, METRICS, change_cell, measured, value_cell

NOTES: Final = (
    INTERVALS,
    "All rows read the base's tokens, the fine-tunes as well: perplexities over other tokens could "
    "not be compared.",
)


def conditions_table(conditions: Sequence[Condition]) -> Shown:
    """Returns all rows with their changes from the first, which is the base."""
    baseline = conditions[0].scores
    names = measured(baseline.to_json())
    rows: list[list[Cell]] = []
    for condition in conditions:
        values, changed = condition.scores.to_json(), changes(condition.scores, baseline)
        row: list[Cell] = [condition.label, condition.scale, condition.norm]
        for name in names:
            row.append(value_cell(values, name))
            row.append(None if condition is conditions[0] else change_cell(changed[name]))
        rows.append(row)
    columns = ["weights", "scale", "norm added"]
    for name in names:
        columns += [METRICS[name], "Δ"]
    return Shown("Kernel and fine-tunes against the base (FM tables 3 and 4)", columns, rows)


def uniform_table(entries: Sequence[Mapping[str, Any]]) -> Shown:
    """Returns the changes that the sampled weights make against uniform ones."""
    names = list(entries[0]["changes"])
    return Shown(
        "Sampled weights against uniform weights of equal norm: what the weighting itself does",
        ["scale", *(METRICS[name] for name in names)],
        [
            [entry["scale"], *(change_cell(entry["changes"][name]) for name in names)]
            for entry in entries
        ],
    )


def eval_drawings(records: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """Returns the changes along the kernel, and the fine-tunes'.

    Args:
        records: JSON of the conditions, the base first.
    """
    found = {(record["label"], record["scale"]): record["changes"] for record in records[1:]}
    scales = sorted({scale for _, scale in found if scale is not None})
    along = list(dict.fromkeys(label for label, scale in found if scale is not None))
    drawings = metric_drawings(
        {label: [found.get((label, scale)) for scale in scales] for label in along},
        x=scales,
        x_title="scale",
        shape=Shape.CURVES,
        what="The base with the kernel at each scale, against the base alone",
    )
    models = [label for label, scale in found if scale is None]
    return drawings + metric_drawings(
        {"change": [found[label, None] for label in models]},
        x=models,
        x_title="",
        shape=Shape.BARS,
        what="The fine-tunes as they are, against the base",
    )


def outputs_table(outputs: Sequence[Output]) -> Shown:
    """Returns the answers, a row each."""
    return Shown(
        "Greedy answers along the sampled kernel (FM 4.5)",
        ["prompt", "scale", "repeated %", "answer"],
        [
            [
                output.prompt,
                output.scale,
                round(100 * output.repeated, 1),
                " ".join(output.text.split()),
            ]
            for output in outputs
        ],
        ("repeated: share of an answer's runs of four tokens that it wrote before.",),
    )
