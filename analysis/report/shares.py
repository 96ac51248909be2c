"""The report's sections on principal components: FM tables 2 and 6, or FM appendix B of two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from analysis.components import layer_curve, mean
from analysis.record import TensorStudy
from analysis.report import figures
from analysis.report.content import Figure, Section, Table, percent, percents
from analysis.selection import Component

KINDS = {
    "_centred": "raw, centred (FM's)",
    "": "raw, uncentred",
    "_normalised_centred": "of equal norm, centred",
    "_normalised": "of equal norm, uncentred",
}
_INTERVAL = (
    "Intervals are 95 % of a bootstrap over runs of elements, their ends averaged over tensors; "
    "the null's mark is what unrelated deltas of the same norms stay below 95 times in 100."
)


def share_sections(studies: Sequence[TensorStudy], summary: Mapping[str, Any]) -> Iterable[Section]:
    """Yields what these fine-tunes share, as far as their number allows to say it."""
    if summary["shared_fraction"] is not None:
        yield _shared(summary["shared_fraction"])
        return
    if summary["components"]["all"]["pc1_centred"] is None:
        return
    yield _overview(summary)
    yield _by_component(summary)
    yield _by_layer(studies, summary)
    yield _spectra(studies)


def _overview(summary: Mapping[str, Any]) -> Section:
    row = summary["components"]["all"]
    rows = [
        (
            label,
            percent(row[f"pc1{kind}"]),
            percents(row[f"interval{kind}"]),
            percent(row[f"null95{kind}"]),
            percent(row[f"majority_share{kind}"]),
            percent(row[f"significant_share{kind}"]),
        )
        for kind, label in KINDS.items()
    ]
    columns = ("deltas", "PC1", "95 % interval", "null", "tensors > 50 %", "significant")
    caption = (
        f"FM table 2: means over {row['num_tensors']} tensors. {_INTERVAL} Significant: tensors "
        "that stand against the null at a false discovery rate of 5 % over all of them "
        "(Benjamini-Hochberg)."
    )
    sentence = (
        f"PC1 explains {percent(row['pc1_centred'])} of what the fine-tunes' deltas vary by (raw, "
        "centred); unrelated deltas of the same norms stay below "
        f"{percent(row['null95_centred'])}. The mean cosine of two deltas is "
        f"{row['cos_mean']:.3f}. A large PC1 is shared structure only where the deltas have alike "
        "norms and directions: see the loadings and the rows of equal norm."
    )
    return Section(
        heading="What the fine-tunes share",
        sentences=[sentence],
        tables=[Table(caption=caption, columns=columns, rows=rows)],
    )


def _by_component(summary: Mapping[str, Any]) -> Section:
    components: Mapping[str, Mapping[str, Any]] = summary["components"]
    rows = [
        (
            name,
            row["num_tensors"],
            percent(row["pc1_centred"]),
            percents(row["interval_centred"]),
            percent(row["null95_centred"]),
            percent(row["significant_share_centred"]),
            percent(row["pc1_normalised_centred"]),
            row["cos_mean"],
            row["snr"],
        )
        for name, row in components.items()
    ]
    columns = (
        "component", "tensors", "PC1", "95 % interval", "null", "significant", "PC1, equal norm",
        "mean cosine", "SNR",
    )  # fmt: skip
    figure = Figure(
        caption=f"PC1's share by component, raw and centred; means over tensors. {_INTERVAL}",
        label="Bars of PC1's share for each projection, attention, MLP and all, with its null.",
        spec=figures.shares_by_component(components, kind="_centred"),
    )
    caption = (
        "FM table 6, one family: means over tensors, raw and centred but where said. SNR is the "
        "norm of the mean delta over the root mean square of what each delta has besides it."
    )
    return Section(
        heading="By component",
        figures=[figure],
        tables=[Table(caption=caption, columns=columns, rows=rows)],
    )


def _by_layer(studies: Sequence[TensorStudy], summary: Mapping[str, Any]) -> Section:
    layers = sorted({study.layer for study in studies if study.layer is not None})
    gap = Figure(
        caption="Attention's mean PC1 minus the MLP's, layer by layer (FM 4.3).",
        label="A bar for each layer.",
        spec=figures.bars(
            list(range(len(summary["gap_per_layer"]))),
            {"gap": summary["gap_per_layer"]},
            x_title="layer",
            y_title="attention - MLP",
            percent=True,
        ),
    )
    drawn = [_projections_by_layer(studies, layers), gap]
    return Section(heading="By layer", figures=drawn if layers else [])


def _projections_by_layer(studies: Sequence[TensorStudy], layers: Sequence[int]) -> Figure:
    by_place = {(study.component, study.layer): study for study in studies}
    present = [c.value for c in Component if any(study.component == c for study in studies)]
    series: dict[str, list[float | None]] = {}
    intervals: dict[str, list[Sequence[float] | None]] = {}
    for component in present:
        found = [by_place.get((component, layer)) for layer in layers]
        series[component] = [None if one is None else one.pc1_centred for one in found]
        intervals[component] = [None if one is None else one.interval_centred for one in found]
    null = layer_curve(studies, "all", field="null95_centred")
    return Figure(
        caption="PC1's share of every projection, raw and centred, with its own 95 % interval "
        "(bootstrap over runs of elements).",
        label="A line over the layers for each projection.",
        spec=figures.curves(
            layers,
            series,
            intervals=intervals,
            dotted={"null, mean of the layer": [null.get(layer) for layer in layers]},
            x_title="layer",
            y_title="PC1's share",
            percent=True,
        ),
    )


def _spectra(studies: Sequence[TensorStudy]) -> Section:
    series: dict[str, list[float | None]] = {}
    for label, field in (("centred", "spectrum_centred"), ("uncentred", "spectrum")):
        spectra = [getattr(study, field) for study in studies if getattr(study, field)]
        series[label] = [fmean(shares) for shares in zip(*spectra, strict=True)]
    ranks = {
        "centred": mean(study.effective_rank_centred for study in studies),
        "uncentred": mean(study.effective_rank for study in studies),
    }
    num_components = max(map(len, series.values()))
    figure = Figure(
        caption="Shares of all principal components, means over tensors, raw deltas. Effective "
        f"rank: {ranks['centred']:.2f} centred, {ranks['uncentred']:.2f} uncentred (means over "
        "tensors of the exponential of the shares' entropy).",
        label="Bars of each component's share, centred and uncentred.",
        spec=figures.bars(
            [f"PC{number + 1}" for number in range(num_components)],
            series,
            x_title="component",
            y_title="share",
            percent=True,
        ),
    )
    return Section(heading="Spectrum", figures=[figure])


def _shared(shared: Mapping[str, Any]) -> Section:
    rows = [(component, percent(value)) for component, value in shared["components"].items()]
    rows.append(("all", percent(shared["mean"])))
    caption = (
        f"Shared fraction of two: cos² of their deltas, means over tensors (standard deviation "
        f"{shared['std']:.3f}); unrelated deltas stay below {100 * shared['null95']:.2f} % 95 "
        "times in 100. FM appendix B gives no formula."
    )
    return Section(
        heading="What the two fine-tunes share",
        sentences=[
            "PC1 needs three fine-tunes: centred with two it is 100 % by construction, so it is "
            "not shown."
        ],
        tables=[Table(caption=caption, columns=("component", "shared fraction"), rows=rows)],
    )
