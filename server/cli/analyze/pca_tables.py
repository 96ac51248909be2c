"""A study's shares, cosines and norms as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from analysis.record import TensorStudy
from server.cli.analyze.output import Cell, Shown

KINDS = {
    "_centred": "raw, centred (FM's)",
    "": "raw, uncentred",
    "_normalised_centred": "normalised, centred",
    "_normalised": "normalised, uncentred",
}


def family_table(summary: Mapping[str, Any]) -> Shown:
    """Returns FM table 2: the means over all tensors, for each way to do PCA."""
    row, kernel = summary["components"]["all"], summary["kernel"]
    rows: list[Sequence[Cell]] = [
        (
            label,
            row[f"pc1{kind}"],
            _interval(row[f"interval{kind}"]),
            row[f"null95{kind}"],
            row[f"majority_share{kind}"],
            row[f"significant_share{kind}"],
        )
        for kind, label in KINDS.items()
    ]
    columns = ("deltas", "PC1", "interval", "null95", "> 50 %", "signif.")
    return Shown(
        f"PC1 of {len(summary['variants'])} fine-tunes: means over {row['num_tensors']} tensors "
        "(FM table 2)",
        columns,
        rows,
        (
            f"Mean pairwise cosine {row['cos_mean']:.3f}, SNR {row['snr']:.3f} per tensor, "
            f"{kernel['snr']:.3f} over all; Metropolis-Hastings accepts "
            f"{kernel['acceptance_ratio']:.3f} (T = {kernel['temperature']:g}).",
        ),
    )


def component_table(summary: Mapping[str, Any], *, kind: str) -> Shown:
    """Returns FM table 6 of one family, for one way to do PCA: a key of `KINDS`."""
    fields = (f"pc1{kind}", f"null95{kind}", f"majority_share{kind}", f"significant_share{kind}")
    components = summary["components"]
    rows: list[Sequence[Cell]] = [
        (
            name,
            row["num_tensors"],
            *(row[field] for field in fields),
            row["cos_mean"],
            row["snr"],
        )
        for name, row in components.items()
    ]
    if {"attention", "mlp"} <= set(components):
        pc1, cos, snr = (
            _difference(components["attention"][field], components["mlp"][field])
            for field in (f"pc1{kind}", "cos_mean", "snr")
        )
        rows.append(("gap", None, pc1, None, None, None, cos, snr))
    columns = ("component", "T", "PC1", "null95", "> 50 %", "signif.", "cos", "SNR")
    others = components["all"]["num_tensors"] - sum(
        components[name]["num_tensors"] for name in ("attention", "mlp") if name in components
    )
    note = f"Tensors of no component (biases, norms, embeddings), in all alone: {others}."
    return Shown(
        f"PC1 by component, {KINDS[kind]} (FM table 6)", columns, rows, (note,) if others else ()
    )


def gap_table(summary: Mapping[str, Any]) -> Shown:
    """Returns attention's PC1 minus the MLP's, layer by layer."""
    gaps = summary["gap_per_layer"]
    return Shown(
        "Gap of PC1 by layer",
        ("layer", "gap"),
        [(str(layer), gap) for layer, gap in enumerate(gaps) if gap is not None],
        ("Attention's PC1 minus the MLP's, raw and centred.",),
    )


def variant_table(summary: Mapping[str, Any]) -> Shown:
    """Returns FM tables 8 to 10."""
    fields = ("delta_norm", "delta_norm_max", "delta_norm_min", "epsilon", "cos")
    rows = [(name, *(row[field] for field in fields)) for name, row in summary["variants"].items()]
    columns = ("fine-tune", "|Δ|", "max", "min", "ε", "cos to base")
    return Shown("Fine-tunes: norms over tensors (FM tables 8 to 10)", columns, rows)


def loading_table(summary: Mapping[str, Any]) -> Shown:
    """Returns which part of PC1 each fine-tune brings."""
    rows = [
        (name, row["loading"], row["loading_uncentred"])
        for name, row in summary["variants"].items()
    ]
    return Shown(
        "Squared loadings of PC1: means over tensors", ("fine-tune", "centred", "uncentred"), rows
    )


def cosine_table(summary: Mapping[str, Any]) -> Shown:
    """Returns the pairwise cosines, with what unrelated deltas stay below."""
    pairwise = summary["pairwise_cosine"]
    names = pairwise["names"]
    rows = [
        (
            one,
            other,
            pairwise["matrix"][row][column],
            pairwise["null95"][row][column],
        )
        for row, one in enumerate(names)
        for column, other in enumerate(names)
        if row < column
    ]
    return Shown("Cosines between deltas: means over tensors", ("", "", "cos", "null95"), rows)


def shared_table(summary: Mapping[str, Any], studies: Sequence[TensorStudy]) -> Shown:
    """Returns FM appendix B: what two deltas share, in all and by component."""
    shared = summary["shared_fraction"]
    rows: list[Sequence[Cell]] = [
        (
            component,
            value,
            _shared_interval([study for study in studies if study.component == component]),
            None,
        )
        for component, value in shared["components"].items()
    ]
    rows.append(("all", shared["mean"], _shared_interval(studies), shared["null95"]))
    return Shown(
        "Shared fraction of two",
        ("component", "shared", "interval", "null95"),
        rows,
        (
            f"Standard deviation over tensors {shared['std']:.4f}; intervals are means of the "
            "tensors' own. FM appendix B gives no "
            "formula; here it is cos², the part of either delta's energy that lies along the "
            "other.",
        ),
    )


def across_table(across: Mapping[str, Any]) -> Shown:
    """Returns FM table 6's last column, for raw and for normalised deltas."""
    rows: list[Sequence[Cell]] = []
    for group, raw in across["pc1_centred"].items():
        normalised = across["pc1_normalised_centred"][group]
        rows.append((
            group,
            *_correlation(raw),
            *_correlation(normalised),
            None if raw is None else raw["num_points"],
        ))  # fmt: skip
    ours, theirs = across["families"]
    return Shown(
        f"PC1's curve over layers in {ours} and {theirs}: Pearson's r (FM table 6)",
        ("component", "raw", "95 %", "normalised", "95 %", "layers"),
        rows,
        (
            "Centred PC1, by relative depth. The intervals take layers as independent, which "
            "neighbours are not.",
        ),
    )


def tensor_table(studies: Sequence[TensorStudy]) -> Shown:
    """Returns one row for each tensor."""
    rows = [
        (
            study.name if study.component is None else f"{study.layer}.{study.component}",
            study.pc1_centred,
            _interval(study.interval_centred),
            study.null95_centred,
            None if study.p_value_centred is None else f"{study.p_value_centred:.3f}",
            study.cos_mean,
            study.single_source or "",
        )
        for study in studies
    ]
    columns = ("tensor", "PC1", "interval", "null95", "p", "cos", "source")
    return Shown(
        "Tensors",
        columns,
        rows,
        (
            "PC1 is raw and centred. Source: the one fine-tune that is PC1, with a squared loading "
            "above 0.8.",
        ),
    )


def notes(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns how the numbers were made, and what they do not say."""
    method = summary["method"]
    if summary["shared_fraction"] is not None:
        return ()
    return (
        f"Null: {method['num_draws']} draws of a random sign for each run of elements and "
        "fine-tune, which keep every norm; null95 are means of the tensors' own. Significant: "
        "stands at a false discovery rate of 5 % over all tensors (Benjamini-Hochberg).",
        "Bootstrap: over runs of elements. Neither says what other fine-tunes would show; see "
        "`linker analyze stability`. Squared loadings near 1 (uncentred) or 1 - 1/N (centred) mean "
        "that one fine-tune is PC1.",
    )


def _shared_interval(studies: Sequence[TensorStudy]) -> str | None:
    found = [one.shared_interval for one in studies if one.shared_interval is not None]
    return _interval([fmean(ends) for ends in zip(*found, strict=True)]) if found else None


def _interval(interval: Sequence[float] | None) -> str | None:
    return None if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _correlation(found: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    if found is None:
        return None, None
    low, high = found["low"], found["high"]
    return f"{found['r']:+.2f}", None if low is None else f"{low:+.2f} to {high:+.2f}"
