"""What a round of streams measured, and what rounds amount to. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import numpy as np

_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Streams that ran at once.

    Attributes:
        seconds: From the first request to the last token.
        streams: When tokens came, in seconds since the start, a sequence for each stream.
        num_tokens: Of all streams; more than their times where several came together.
    """

    seconds: float
    streams: Sequence[Sequence[float]]
    num_tokens: int

    @classmethod
    def merged(cls, rounds: Sequence[Self], *, at_once: bool) -> Self:
        """Returns rounds as one: their time is the longest if they ran at once, else the sum."""
        return cls(
            seconds=(max if at_once else sum)(each.seconds for each in rounds),
            streams=[stream for each in rounds for stream in each.streams],
            num_tokens=sum(each.num_tokens for each in rounds),
        )

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all streams in a second."""
        return self.num_tokens / self.seconds

    @property
    def first_token_s(self) -> list[float]:
        """How long each stream waited for its first token."""
        return [stream[0] for stream in self.streams if stream]

    @property
    def gaps_s(self) -> list[float]:
        """How long it took from each token to the next of the same stream."""
        return [gap for stream in self.streams for gap in np.diff(stream).tolist()]


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Returns the rate's median over the rounds, and percentiles over all of their tokens."""
    rates = [each.tokens_per_s for each in rounds]
    figures: dict[str, Any] = {"tokens_per_s": median(rates), "rates": rates}
    for name, values in (
        ("ttft_ms", [value for each in rounds for value in each.first_token_s]),
        ("itl_ms", [value for each in rounds for value in each.gaps_s]),
    ):
        if values:
            found = np.percentile(np.array(values) * 1e3, _PERCENTILES).tolist()
            figures[name] = {f"p{p}": v for p, v in zip(_PERCENTILES, found, strict=True)}
    return figures


def paired_ratio(
    ours: Iterable[Round], theirs: Iterable[Round], *, of: Callable[[Round], float]
) -> float:
    """Returns the median over the rounds of one figure of ours through theirs."""
    return median(of(a) / of(b) for a, b in zip(ours, theirs, strict=True))


def against_best(
    ours: Sequence[Round],
    peers: Mapping[str, Sequence[Round]],
    *,
    of: Callable[[Round], float] = lambda each: each.tokens_per_s,
) -> dict[str, Any]:
    """Returns our ratio to each peer, and to the one whose figure has the greatest median."""
    ratios = {name: paired_ratio(ours, rounds, of=of) for name, rounds in peers.items()}
    best = max(peers, key=lambda name: median(map(of, peers[name])), default=None)
    return {"ratios": ratios, "best_peer": best, "ratio": ratios[best] if best else None}
