"""The dashboard *Weights*: what fine-tunes of a family have in common, and which stand apart."""

from __future__ import annotations

from grafana_foundation_sdk.builders import barchart, bargauge, stat, table, timeseries
from grafana_foundation_sdk.models.dashboard import Dashboard

from configs.grafana.generator.charts import gauges, lines, tile
from configs.grafana.generator.layout import Band, Section, laid_out
from configs.grafana.generator.queries import FAMILY, MEMBER, MODEL, SERVER, Query, rate
from configs.grafana.generator.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    YELLOW,
    blank,
    by_threshold,
    colored,
    in_words,
    thresholds,
)
from configs.grafana.generator.tables import beside, by_model

_WHOLE = f'{FAMILY},component="all"'  # all tensors that were studied
_UNSTUDIED = "no family has been studied yet"
_TOO_FEW = "no family has three fine-tunes that were studied"


def weights() -> Dashboard:
    """Returns the dashboard."""
    figures = (_share(), _null(), _cosine(), _signal(), _findings(), _oldest())
    direction = (
        Band(height=10, widths=(12, 12), panels=(_components(), _components_signal())),
        Band(height=9, widths=(12, 12), panels=(_over_time(), _cosine_over_time())),
    )
    models = (
        Band(height=10, widths=(8, 8, 8), panels=(_norms(), _jackknife(), _acceptance())),
        Band(height=10, widths=(24,), panels=(_diagnostics(),)),
    )
    work = (Band(height=8, widths=(8, 8, 8), panels=(_ages(), _cpu(), _cores())),)
    sections = (
        Section(title=None, bands=(Band(height=4, widths=(4,) * 6, panels=figures),)),
        Section(title="Shared direction", bands=direction),
        Section(title="Fine-tunes", bands=models),
        Section(title="Studies", bands=work),
    )
    what = "What fine-tuning did to the weights of each family, as studied in the background."
    return laid_out("linker-weights", "LinkerLLM / Weights", what, sections)


def _share() -> stat.Panel:
    what = (
        "PC1: share of the variance between fine-tunes that lies along one direction, the mean "
        "over tensors (centred) and the chosen families. To be read against its null, beside it."
    )
    query = Query(f"avg(linker_pc1_variance_ratio{{{_WHOLE}}})")
    return tile("PC1", what, "percentunit", query).decimals(1).no_value(_TOO_FEW)


def _null() -> stat.Panel:
    what = (
        "What 95 % of such shares are below where the fine-tunes have nothing in common: with few "
        "of them it is high by itself."
    )
    query = Query(f"avg(linker_pc1_null_ratio{{{_WHOLE}}})")
    return tile("PC1, 95 % of the null", what, "percentunit", query).decimals(1).no_value(_TOO_FEW)


def _cosine() -> stat.Panel:
    what = "Cosine between what two fine-tunes added to the base, the mean over pairs and tensors."
    query = Query(f"avg(linker_pairwise_cosine{{{FAMILY}}})")
    return tile("Pairwise cosine", what, "none", query).decimals(3).no_value(_UNSTUDIED)


def _signal() -> stat.Panel:
    what = (
        "Norm of the mean of what fine-tunes added, over the root mean square of what they differ "
        "from it by; the mean over tensors."
    )
    query = Query(f"avg(linker_kernel_snr{{{_WHOLE}}})")
    return tile("Signal to noise", what, "none", query).decimals(2).no_value(_UNSTUDIED)


def _findings() -> stat.Panel:
    what = "What the studies found of the chosen models; the table below says what, and of which."
    query = Query(f"sum(linker_diagnostic{{{MODEL}}})")
    panel = tile("Findings", what, "none", query).no_value(_UNSTUDIED)
    return panel.color_scheme(by_threshold()).thresholds(thresholds(GREEN, (1, YELLOW)))


def _oldest() -> stat.Panel:
    what = "How long ago the oldest of the studies that are shown ended."
    query = Query(f"max(linker_analysis_age_seconds{{{FAMILY}}})")
    return tile("Oldest study", what, "s", query).no_value(_UNSTUDIED)


def _components() -> barchart.Panel:
    what = (
        "PC1 by projection, and what 95 % of shares are below where nothing is shared. Attention "
        "is q, k, v and o; mlp is gate, up and down. Of several chosen families the mean."
    )
    panel = beside(
        "PC1 by component, against its null",
        what,
        "percentunit",
        Query(f"avg by (component) (linker_pc1_variance_ratio{{{FAMILY}}})", "PC1"),
        Query(f"avg by (component) (linker_pc1_null_ratio{{{FAMILY}}})", "95 % of the null"),
        by="component",
    )
    panel = panel.override_by_name("PC1", [colored(BLUE)])
    panel = panel.override_by_name("95 % of the null", [colored(GREY)])
    return panel.max(1).no_value(_TOO_FEW)


def _components_signal() -> bargauge.Panel:
    what = (
        "Norm of the mean of what fine-tunes added over what they differ from it by, by component; "
        "the kernel weighs tensors by this, PC1 and the cosine."
    )
    query = Query(f"avg by (component) (linker_kernel_snr{{{FAMILY}}})", "{{component}}")
    panel = gauges("Signal to noise by component", what, "none", query)
    return panel.decimals(2).no_value(_UNSTUDIED)


def _over_time() -> timeseries.Panel:
    what = (
        "PC1 of all tensors and its null, by family. It moves with the study that follows when a "
        "fine-tune comes or goes."
    )
    share = f"max by (family) (linker_pc1_variance_ratio{{{_WHOLE}}})"
    null = f"max by (family) (linker_pc1_null_ratio{{{_WHOLE}}})"
    panel = lines(
        "PC1 and its null, over time",
        what,
        "percentunit",
        Query(share, "{{family}}"),
        Query(null, "{{family}}, 95 % of the null"),
    )
    return panel.max(1).no_value(_TOO_FEW)


def _cosine_over_time() -> timeseries.Panel:
    what = "Cosine between what two fine-tunes added, the mean over pairs and tensors, by family."
    query = f"max by (family) (linker_pairwise_cosine{{{FAMILY}}})"
    panel = lines("Pairwise cosine, over time", what, "none", Query(query, "{{family}}"))
    return panel.min(-1).max(1).no_value(_UNSTUDIED)


def _norms() -> bargauge.Panel:
    what = "Norm of what each fine-tune added to a tensor, the mean over tensors."
    query = Query(f"max by (model) (linker_delta_norm{{{MODEL}}})", "{{model}}")
    return gauges("Delta norm", what, "none", query).decimals(3).no_value(_UNSTUDIED)


def _jackknife() -> bargauge.Panel:
    what = (
        "Cosine between the family's first principal component with this fine-tune and without it. "
        "Near 1 it is of the core; low where the direction hangs on this one."
    )
    query = Query(f"max by (model) (linker_jackknife_cosine{{{MEMBER}}})", "{{model}}")
    panel = gauges("Jackknife cosine", what, "none", query).max(1).decimals(3)
    panel = panel.no_value("no family has four fine-tunes that were studied")
    return panel.thresholds(thresholds(RED, (0.5, ORANGE), (0.8, YELLOW), (0.95, GREEN)))


def _acceptance() -> bargauge.Panel:
    what = (
        "Share of proposals that the sampler of each family's kernel accepted. Near 1 the scores "
        "of its tensors are so small beside its temperature that they say little."
    )
    query = Query(f"max by (family) (linker_kernel_acceptance_ratio{{{FAMILY}}})", "{{family}}")
    panel = gauges("Kernel acceptance", what, "percentunit", query)
    return panel.max(1).no_value(_UNSTUDIED)


def _diagnostics() -> table.Panel:
    what = (
        "What the last study found of each fine-tune; none is a fault by itself. The reasons and "
        "their numbers are in /ui and GET /analysis/FAMILY; docs/analysis.md says how to read them."
    )
    query = Query(f"max by (model, kind) (linker_diagnostic{{{MODEL}}})")
    panel = by_model("Diagnostics", what, "none", query, label="kind").min_width(110)
    return panel.mappings([in_words([("no", "transparent"), ("yes", ORANGE)]), blank()])


def _ages() -> timeseries.Panel:
    what = "How long ago the study ended that is shown of each family."
    query = f"max by (family) (linker_analysis_age_seconds{{{FAMILY}}})"
    panel = lines("Age of studies", what, "s", Query(query, "{{family}}"))
    return panel.no_value(_UNSTUDIED)


def _cpu() -> timeseries.Panel:
    what = (
        "Cores that studies keep busy, while sequences run and else: a process of its own at low "
        "priority, which gives way to sequences."
    )
    query = f"sum by (sequences) ({rate('linker_analysis_cpu_seconds_total', SERVER)})"
    panel = lines("CPU of studies", what, "none", Query(query, "sequences: {{sequences}}"))
    return panel.decimals(2)


def _cores() -> bargauge.Panel:
    what = (
        "Cores that a study kept busy on average since the server started, of the time it was at "
        "work while sequences ran, and of the rest."
    )
    used = f"sum by (sequences) (linker_analysis_cpu_seconds_total{{{SERVER}}})"
    at_work = f"sum by (sequences) (linker_analysis_seconds_total{{{SERVER}}})"
    query = Query(f"{used} / ({at_work} > 0)", "sequences: {{sequences}}")
    panel = gauges("Cores of a study at work", what, "none", query)
    return panel.decimals(2).no_value("no study was at work yet")
