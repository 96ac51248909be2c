"""The page's modules on an empty page and without a server, over records of our making."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from playwright.sync_api import Browser, Page, Route

from server.ui.assets import asset_files, read_asset
from tests.browser.chromium import DEADLINE_MS, until
from tests.browser.watch import Watch

ORIGIN: Final = "http://page.test"
CHARTS: Final = "plotly.min.js"
_CHARTED = ("map", "heatmap", "frontier", "diagnostics", "study", "direction", "fine_tunes")
_SECTIONS = "".join(f'<section id="{name}"></section>' for name in _CHARTED)
_STAGE = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Stage</title>
<script src="/ui/theme.js"></script><link rel="stylesheet" href="/ui/theme.css">
<link rel="stylesheet" href="/ui/charts.css"><link rel="stylesheet" href="/ui/figures.css">
</head><body>{_SECTIONS}</body></html>"""
_PLAY = """async ({models, details, studies, section}) => {
  const {store} = await import("/ui/store.js");
  const topics = ["models", "details", "jobs", "studies"];
  if (models !== null) for (const topic of topics) store.told.add(topic);
  for (const study of studies) store.studies.set(study.family, study);
  for (const model of models ?? []) store.models.set(model.id, model);
  for (const [id, detail] of Object.entries(details)) store.details.set(id, detail);
  (await import(`/ui/${section}.js`)).mount(document.getElementById(section), store);
}"""


class Stage:
    """A page that has nothing but the modules.

    Args:
        page: Which; it has not been anywhere yet.
        missing: Names of files that are not there.
    """

    def __init__(self, page: Page, missing: frozenset[str] = frozenset()) -> None:
        self.page = page
        self.watch = Watch(page, ORIGIN)
        self._missing = missing
        page.route(f"{ORIGIN}/**", self._answer)
        page.goto(f"{ORIGIN}/")

    def call(self, module: str, expression: str, **given: Any) -> Any:
        """Evaluates an expression over a module `m` and what is `given`."""
        names = ", ".join(given)
        source = f"async ({{{names}}}) => {{ const m = await import('/ui/{module}.js');"
        return self.page.evaluate(f"{source} return {expression}; }}", given)

    def until(self, module: str, expression: str) -> None:
        """Waits until an expression over a module `m` is true."""
        until(self.page, lambda: bool(self.call(module, expression)))

    def mend(self) -> None:
        """Lets the files that were missing be there."""
        self._missing = frozenset()

    def play(
        self,
        section: str,
        models: list[dict[str, Any]] | None,
        details: dict[str, dict[str, Any]] | None = None,
        studies: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Mounts a section over these records; without models, nothing has been told of yet."""
        given = {
            "models": models,
            "details": details or {},
            "studies": list(studies),
            "section": section,
        }
        self.page.evaluate(_PLAY, given)

    def _answer(self, route: Route) -> None:
        name = route.request.url.removeprefix(f"{ORIGIN}/")
        policy = {"Content-Security-Policy": "default-src 'self'; img-src 'self' data:"}
        if name == "":
            route.fulfill(body=_STAGE, content_type="text/html; charset=utf-8", headers=policy)
            return
        file = name.removeprefix("ui/")
        if file in self._missing:
            route.fulfill(status=404, body="")
            return
        asset = read_asset(asset_files()[file])
        route.fulfill(body=asset.body, content_type=asset.media_type)


@contextmanager
def staged(browser: Browser, missing: frozenset[str] = frozenset()) -> Iterator[Stage]:
    """Opens a stage; at its end nothing may have gone wrong on it."""
    context = browser.new_context(reduced_motion="reduce")
    context.set_default_timeout(DEADLINE_MS)
    try:
        stage = Stage(context.new_page(), missing)
        for name in missing:
            stage.watch.forgive(f"/ui/{name}", 404)
        yield stage
        assert stage.watch.troubles == []
    finally:
        context.close()


def card(
    name: str, *, donor: str | None = None, unique: int, logical: int = 1000
) -> dict[str, Any]:
    """Returns a resident model's record, as far as charts read it.

    Args:
        name: Of the model.
        donor: Its donor; None: it is one.
        unique: Bytes of its own.
        logical: Bytes of a separate copy.
    """
    plan = {
        "price": {"kl": 0.002, "kl_upper": 0.003, "top1": 0.9, "ppl_ratio": 1.01, "tokens": 100},
        "budget_kl": 0.01,
        "mean_epsilon": 0.03,
        "mean_cos": 0.999,
        "region": "aligned",
        "rung_bytes": {"alias": 0, "own": unique},
        "bits_per_weight": 1.5,
        "digest": name,
    }
    return {
        "id": name,
        "state": "ready",
        "family": "family",
        "donor": donor,
        "bytes": {
            "logical": logical,
            "unique": unique,
            "shared": logical - unique,
            "saved": logical - unique,
            "checkpoint": logical,
        },
        "plan": None if donor is None else plan,
        "created_at": 1.0,
    }
