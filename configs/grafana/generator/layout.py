"""Puts panels on Grafana's grid of 24 columns, and dashboards around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import (
    AnnotationQuery,
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    GridPos,
    Panel,
    RowPanel,
)

from configs.grafana.generator.queries import SERVER
from configs.grafana.generator.style import DATASOURCE
from configs.grafana.generator.variables import variables

COLUMNS = 24
TAG = "linker"
# Panels of another version are migrated when they are loaded, those without one as the oldest.
GRAFANA = "11.6.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Panels beside each other, each with as many columns as `widths` gives it."""

    height: int  # of about 30 pixels
    widths: tuple[int, ...]
    panels: Sequence[Builder[Panel]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Bands below each other, under a heading or at the very top."""

    title: str | None
    bands: Sequence[Band]


class _FiringAlerts(AnnotationQuery):
    """Alerts as they fired; the builders know no titles of annotations."""

    def to_json(self) -> dict[str, object]:
        titles = {
            "titleFormat": "{{alertname}}",
            "textFormat": "{{instance}} {{model}}",
            "tagKeys": "severity",
        }
        return super().to_json() | titles


class _Alerts(Builder[AnnotationQuery]):
    def build(self) -> AnnotationQuery:
        return _FiringAlerts(
            name="Alerts",
            datasource=DATASOURCE,
            enable=True,
            icon_color="red",
            expr=f'ALERTS{{alertname=~"Linker.+",alertstate="firing",{SERVER}}}',
        )


def laid_out(uid: str, title: str, what: str, sections: Sequence[Section]) -> Dashboard:
    """Returns a dashboard with its variables and links."""
    others = dashboard.DashboardLink("LinkerLLM").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(what)
        .tags([TAG])
        .readonly()  # what is changed in Grafana is lost with the next file
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .variables(variables())
        .annotation(_Alerts())
        .link(others.include_vars(True).keep_time(True))
        .build()
    )
    built.panels = _placed(sections)
    return built


def _placed(sections: Sequence[Section]) -> list[Panel | RowPanel]:
    placed: list[Panel | RowPanel] = []
    y = 0
    for section in sections:
        if section.title is not None:
            head = GridPos(h=1, w=COLUMNS, x=0, y=y)
            placed.append(RowPanel(title=section.title, grid_pos=head, id_val=len(placed) + 1))
            y += 1
        for band in section.bands:
            x = 0
            for width, builder in zip(band.widths, band.panels, strict=True):
                panel = builder.build()
                panel.id_val = len(placed) + 1
                panel.datasource = DATASOURCE
                panel.plugin_version = GRAFANA
                panel.grid_pos = GridPos(h=band.height, w=width, x=x, y=y)
                placed.append(panel)
                x += width
            y += band.height
    return placed
