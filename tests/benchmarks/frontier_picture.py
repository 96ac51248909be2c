"""Draws bits per weight against KL, a panel for each variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

_COLUMNS = 2
_PANEL_INCHES = (6.0, 4.2)
_MOST_BITS = 8.0  # shown; what is larger is in the tables
_OURS = {"ours, uniform": "gray", "ours, policy bytes": "black", "ours, policy budget": "crimson"}


class Point(NamedTuple):
    """One form of one variant."""

    variant: str
    series: str
    bits_per_weight: float
    kl: float


def draw(points: Sequence[Point], path: Path) -> None:
    """Writes the picture. Series have the same colour in every panel; ours are drawn thick.

    Args:
        points: In the order in which the legend names their series.
        path: An SVG file.
    """
    mpl.rcParams["svg.hashsalt"] = "linker"  # the same picture gives the same file
    variants = list(dict.fromkeys(point.variant for point in points))
    series = list(dict.fromkeys(point.series for point in points))
    columns = min(_COLUMNS, len(variants))
    rows = -(-len(variants) // columns)
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel in panels[len(variants) :]:
        panel.remove()
    others = [name for name in series if name not in _OURS]
    colours = _OURS | {name: mpl.colormaps["tab20"](i) for i, name in enumerate(others)}
    for panel, variant in zip(panels, variants, strict=False):
        for name in series:
            of_series = [p for p in points if (p.variant, p.series) == (variant, name) and p.kl > 0]
            drawn = sorted((p.bits_per_weight, p.kl) for p in of_series)
            is_ours = name.startswith("ours, policy")
            panel.plot(
                [bits for bits, _ in drawn],
                [kl for _, kl in drawn],
                marker="o" if is_ours else "x",
                markersize=4,
                linewidth=2.2 if is_ours else 0.9,
                linestyle="none" if name.endswith("uniform") else "-",
                color=colours[name],
                label=name,
            )
        panel.set_yscale("log")
        panel.set_xlim(0.0, _MOST_BITS)
        panel.set_title(variant)
        panel.set_xlabel("bits per weight, all in")
        panel.set_ylabel("KL(variant ‖ planned), nats per token")
        panel.grid(visible=True, which="major", alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})
