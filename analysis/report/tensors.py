"""The report's last sections: every tensor's numbers, and how all of them were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.record import TensorStudy
from analysis.report.content import Section, Table, percent, percents


def tensor_section(studies: Sequence[TensorStudy]) -> Section:
    """Returns one row for each tensor."""
    rows = [
        (
            study.name,
            percent(study.pc1_centred),
            percents(study.interval_centred),
            percent(study.null95_centred),
            None if study.p_value_centred is None else f"{study.p_value_centred:.3f}",
            percent(study.pc1),
            study.cos_mean,
            study.snr,
            study.effective_rank_centred,
            study.single_source,
        )
        for study in studies
    ]
    columns = (
        "tensor", "PC1", "95 % interval", "null", "p", "PC1, uncentred", "mean cosine", "SNR",
        "effective rank", "PC1 is",
    )  # fmt: skip
    caption = (
        "Raw deltas, centred but where said. p: share of the null's draws with at least that PC1, "
        "counting the deltas' own, and not corrected for the number of tensors."
    )
    table = Table(caption=caption, columns=columns, rows=rows, folded=True)
    return Section(heading="Tensors", tables=[table])


def method_section(studies: Sequence[TensorStudy], summary: Mapping[str, Any]) -> Section:
    """Returns how the numbers were made, and what they do not say."""
    method = summary["method"]
    elements = sum(study.num_elements for study in studies)
    runs = max(study.num_runs for study in studies)
    return Section(
        heading="Method",
        sentences=[
            f"Deltas are fine-tune minus base (FM Eq. 1), {len(studies)} tensors of {elements:,} "
            f"elements in all, stored as {', '.join(method['dtypes'])}. Their inner products are "
            "summed over every element in float64, exactly as the stored values are; nothing is "
            "sampled. Everything but the intervals and the null follows from these sums.",
            "PCA is of the fine-tunes' deltas as vectors (FM Eq. 2). Centred takes their mean off "
            "first, so that the direction all of them share is taken off, too; uncentred does not. "
            "Of equal norm scales each delta to length 1 first, so that no fine-tune weighs more "
            "because it was trained longer.",
            f"The null keeps every norm and what lies within a run of elements: each tensor is cut "
            f"into up to {runs} contiguous runs, and {method['num_draws']} times each fine-tune's "
            "runs get random signs (seed "
            f"{method['seed']}). It asks whether the deltas are related at all, not whether these "
            "fine-tunes stand for others.",
            "Intervals draw the same runs with replacement (95 %, percentiles): they cover which "
            "weights were looked at, not which fine-tunes; with so few of these, the stability "
            "without each of them says more.",
            "FM is McCabe, Convergent Fine-Tuning Manifolds in Language Model Weight Spaces; BS is "
            "Block-Level Weight-Space Structure Persists Under Post-Training.",
        ],
    )
