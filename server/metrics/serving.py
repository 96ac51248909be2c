"""Counters and histograms of requests. Every label value is a known model's name.

The event loop writes; a scrape renders in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as LibraryCounter

from server.metrics.families import FAMILIES
from server.metrics.sequences import ModelSeries, SequenceMeter
from server.metrics.text import header
from server.metrics.view import View


class Counted(NamedTuple):
    """What requests have come to since the start."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    requests: int = 0  # that ended, one for every sequence


class ServingMetrics:
    """What requests cost and how they ended.

    Args:
        registry: Where the refusals are exposed; `render` gives the rest.
        rejection_reasons: Every reason a request can be refused for; others count as `other`.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        rejection_reasons: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._series: dict[str, ModelSeries] = {}  # by model
        self._gone = Counted()  # of models that were deleted
        self._reasons = frozenset(rejection_reasons)
        refused = FAMILIES["linker_rejections_total"]
        self._rejections = LibraryCounter(
            refused.name, refused.help, refused.labels, registry=registry
        )
        for reason in (*rejection_reasons, "other"):
            self._rejections.labels(reason)

    @property
    def total(self) -> Counted:
        """What all requests have come to, those to models that were deleted included."""
        return _sum(self._gone, *map(_counted, self._series.values()))

    def counted(self, model: str) -> Counted:
        """Returns what a model's requests have come to."""
        series = self._series.get(model)
        return Counted() if series is None else _counted(series)

    def add_model(self, name: str) -> None:
        """Shows a model's series, at 0 until something happens; a known model's stay."""
        if name not in self._series:
            self._series[name] = ModelSeries(name)

    def remove_model(self, name: str) -> None:
        """Drops a deleted model's series."""
        series = self._series.pop(name, None)
        if series is not None:
            self._gone = _sum(self._gone, _counted(series))

    def rejected(self, reason: str) -> None:
        """Counts a refused request."""
        self._rejections.labels(reason if reason in self._reasons else "other").inc()

    def follow(self, model: str, *, num_prompt: int, arrived_s: float) -> SequenceMeter:
        """Returns what times and counts a sequence that is being submitted to the engine.

        Args:
            model: Whose it is. Of one that was deleted meanwhile nothing is kept.
            num_prompt: Its prompt's tokens.
            arrived_s: When its request arrived, by the clock.
        """
        series = self._series.get(model) or ModelSeries(model)
        return SequenceMeter(
            series,
            num_prompt=num_prompt,
            arrived_s=arrived_s,
            submitted_s=self._clock(),
        )

    def render(self, _view: View) -> Iterable[str]:
        """Yields the series of every model, family by family. Any thread may ask."""
        models = list(self._series.values())
        for name in ModelSeries.FAMILIES:
            yield header(FAMILIES[name])
            for model in models:
                yield from model.render(name)


def _counted(series: ModelSeries) -> Counted:
    return Counted(
        prompt_tokens=series.prompt_tokens.value,
        generation_tokens=series.generation_tokens.value,
        requests=sum(ended.value for ended in series.ended.values()),
    )


def _sum(*counted: Counted) -> Counted:
    return Counted(*map(sum, zip(*counted, strict=True)))
