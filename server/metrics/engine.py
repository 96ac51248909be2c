"""What the engine has counted since its start, and whether it runs.

It counts from 0 after a restart, which Prometheus takes for what it is.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.metrics.families import FAMILIES
from server.metrics.series import Histogram
from server.metrics.text import header
from server.metrics.view import View


def render_engine(view: View) -> Iterable[str]:
    """Yields the series that are the engine's and no model's."""
    yield from _numbers(view)
    yield _batches(view)


def _numbers(view: View) -> Iterable[str]:
    report = view.snapshot
    values: dict[str, float] = {
        "linker_engine_up": int(view.engine_up),
        "linker_engine_restarts_total": view.engine_restarts,
        "linker_engine_steps_total": 0 if report is None else report.num_steps,
        "linker_kv_cache_usage_ratio": 0 if report is None else report.kv_usage_ratio,
        "linker_num_preemptions_total": 0 if report is None else report.num_preemptions,
        "linker_prefix_cache_queries_total": 0 if report is None else report.prefix_queries,
        "linker_prefix_cache_hits_total": 0 if report is None else report.prefix_hits,
    }
    for name, value in values.items():
        yield f"{header(FAMILIES[name])}{name} {value}\n"


def _batches(view: View) -> str:
    family = FAMILIES["linker_batch_variants"]
    batches = Histogram(family, {})
    if view.snapshot is not None:
        for num_variants, num_steps in view.snapshot.batch_variants.items():
            batches.observe(num_variants, num_steps)
    return header(family) + batches.render()
