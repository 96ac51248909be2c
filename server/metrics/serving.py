"""Counters and histograms of requests. Every label value is a known model's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram

_TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_PHASE_BUCKETS_S = (
    0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0,
)  # fmt: skip
FINISHED_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """Those of one model, found once: looking them up by label takes longer than counting."""

    prompt_tokens: Counter
    generation_tokens: Counter
    success: Mapping[str, Counter]  # by how sequences ended
    ttft: Histogram
    e2e: Histogram


class ServingMetrics:
    """What requests cost and how they ended.

    Args:
        registry: Where the metrics are exposed.
        rejection_reasons: Every reason a request can be refused for; others count as `other`.
    """

    def __init__(self, registry: CollectorRegistry, *, rejection_reasons: tuple[str, ...]) -> None:
        self._series: dict[str, _Series] = {}  # by model
        self._reasons = frozenset(rejection_reasons)
        self._prompt_tokens = Counter(
            "linker_prompt_tokens", "Prompt tokens processed.", ["model"], registry=registry
        )
        self._generation_tokens = Counter(
            "linker_generation_tokens", "Tokens generated.", ["model"], registry=registry
        )
        self._success = Counter(
            "linker_request_success",
            "Sequences that ended, by how they ended.",
            ["model", "finished_reason"],
            registry=registry,
        )
        self._ttft = Histogram(
            "linker_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            ["model"],
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self._e2e = Histogram(
            "linker_e2e_request_latency_seconds",
            "From the arrival of a request to the end of its answer.",
            ["model"],
            buckets=_PHASE_BUCKETS_S,
            registry=registry,
        )
        self._rejections = Counter(
            "linker_rejections", "Requests refused, by reason.", ["reason"], registry=registry
        )
        for reason in (*rejection_reasons, "other"):
            self._rejections.labels(reason)

    def add_model(self, name: str) -> None:
        """Shows a model's series, at 0 until something happens."""
        self._series[name] = _Series(
            prompt_tokens=self._prompt_tokens.labels(name),
            generation_tokens=self._generation_tokens.labels(name),
            success={reason: self._success.labels(name, reason) for reason in FINISHED_REASONS},
            ttft=self._ttft.labels(name),
            e2e=self._e2e.labels(name),
        )

    def remove_model(self, name: str) -> None:
        """Drops a deleted model's series."""
        self._series.pop(name, None)
        for metric in (self._prompt_tokens, self._generation_tokens, self._ttft, self._e2e):
            metric.remove(name)
        for reason in FINISHED_REASONS:
            self._success.remove(name, reason)

    def rejected(self, reason: str) -> None:
        """Counts a refused request."""
        self._rejections.labels(reason if reason in self._reasons else "other").inc()

    def first_token(self, model: str, *, after_s: float) -> None:
        """Notes a request's first token."""
        if (series := self._series.get(model)) is not None:
            series.ttft.observe(after_s)

    def finished(
        self, model: str, *, reason: str, prompt_tokens: int, tokens: int, after_s: float
    ) -> None:
        """Notes the end of a sequence; of a model that was deleted meanwhile nothing is kept."""
        if (series := self._series.get(model)) is None:
            return
        series.prompt_tokens.inc(prompt_tokens)
        series.generation_tokens.inc(tokens)
        series.success[reason].inc()
        series.e2e.observe(after_s)
