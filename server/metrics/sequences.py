"""The series of one model, and what follows one sequence of it from its submission to its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from server.metrics.families import FAMILIES
from server.metrics.series import Counter, Histogram

FINISHED_REASONS = ("stop", "length", "abort", "error")
_TO_THE_END = frozenset({"stop", "length"})  # how those end that nothing cuts off


class ModelSeries:
    """Everything that is counted and timed of one model's requests."""

    FAMILIES: ClassVar = (
        "linker_prompt_tokens_total",
        "linker_generation_tokens_total",
        "linker_request_success_total",
        "linker_request_prompt_tokens",
        "linker_request_generation_tokens",
        "linker_time_to_first_token_seconds",
        "linker_inter_token_latency_seconds",
        "linker_request_time_per_output_token_seconds",
        "linker_e2e_request_latency_seconds",
        "linker_request_queue_time_seconds",
        "linker_request_prefill_time_seconds",
        "linker_request_decode_time_seconds",
        "linker_request_inference_time_seconds",
    )

    def __init__(self, model: str) -> None:
        self._of_family: dict[str, list[Counter | Histogram]] = {n: [] for n in self.FAMILIES}

        def counter(name: str, **labels: str) -> Counter:
            made = Counter(FAMILIES[name], {"model": model, **labels})
            self._of_family[name].append(made)
            return made

        def histogram(name: str) -> Histogram:
            made = Histogram(FAMILIES[name], {"model": model})
            self._of_family[name].append(made)
            return made

        self.prompt_tokens = counter("linker_prompt_tokens_total")
        self.generation_tokens = counter("linker_generation_tokens_total")
        self.ended = {
            reason: counter("linker_request_success_total", finished_reason=reason)
            for reason in FINISHED_REASONS
        }
        self.num_prompt = histogram("linker_request_prompt_tokens")
        self.num_generated = histogram("linker_request_generation_tokens")
        self.to_first_token = histogram("linker_time_to_first_token_seconds")
        self.between_tokens = histogram("linker_inter_token_latency_seconds")
        self.per_token = histogram("linker_request_time_per_output_token_seconds")
        self.whole = histogram("linker_e2e_request_latency_seconds")
        self.queue = histogram("linker_request_queue_time_seconds")
        self.prefill = histogram("linker_request_prefill_time_seconds")
        self.decode = histogram("linker_request_decode_time_seconds")
        self.inference = histogram("linker_request_inference_time_seconds")

    def render(self, family: str) -> Iterable[str]:
        """Returns the lines of one of the families."""
        return [each.render() for each in self._of_family[family]]


class SequenceMeter:
    """Times and counts one sequence. Made when it is submitted to the engine.

    Queue, prefill and decode follow one another without a gap: prefill begins with the first step
    that computes the sequence and ends with its first token, where decode begins. A token's time
    is when it came from the engine, however slowly a client reads. All are monotonic seconds.

    Args:
        series: The model's.
        num_prompt: The prompt's tokens.
        arrived_s: When the request arrived.
        submitted_s: When the engine was asked.
    """

    __slots__ = (
        "_arrived_s", "_first_s", "_generated", "_last_s", "_num_prompt", "_num_tokens",
        "_observe_gap", "_series", "_started_s", "_submitted_s",
    )  # fmt: skip

    def __init__(
        self,
        series: ModelSeries,
        *,
        num_prompt: int,
        arrived_s: float,
        submitted_s: float,
    ) -> None:
        self._series = series
        # What every token needs, looked up once.
        self._generated = series.generation_tokens
        self._observe_gap = series.between_tokens.observe
        self._num_prompt = num_prompt
        self._arrived_s = arrived_s
        self._submitted_s = submitted_s
        self._started_s = self._first_s = self._last_s = submitted_s
        self._num_tokens = 0

    def began(self, came_s: float, queued_s: float | None) -> None:
        """Notes that the prompt was processed, of a sequence that may have no answer.

        Args:
            came_s: When the first token came.
            queued_s: Until the first step, as the engine says.
        """
        series = self._series
        # The way back from the engine counts as computing.
        self._started_s = min(self._submitted_s + (queued_s or 0.0), came_s)
        self._first_s = self._last_s = came_s
        series.prompt_tokens.value += self._num_prompt
        series.to_first_token.observe(came_s - self._arrived_s)
        series.queue.observe(self._started_s - self._submitted_s)
        series.prefill.observe(came_s - self._started_s)

    def came(self, arrivals_s: Sequence[float], queued_s: float | None = None) -> None:
        """Notes tokens.

        Args:
            arrivals_s: When each of them came, at least one.
            queued_s: With the first: until the first step, as the engine says.
        """
        later_s = arrivals_s
        if not self._num_tokens:
            self.began(arrivals_s[0], queued_s)
            later_s = arrivals_s[1:]
        last_s = self._last_s
        for came_s in later_s:
            self._observe_gap(came_s - last_s)
            last_s = came_s
        num_tokens = len(arrivals_s)
        self._generated.value += num_tokens
        self._num_tokens += num_tokens
        self._last_s = last_s

    def ended(self, reason: str) -> None:
        """Notes how the sequence ended, one of `FINISHED_REASONS`."""
        series = self._series
        series.ended[reason].value += 1
        if reason not in _TO_THE_END:
            return  # what was cut off says nothing of how long an answer takes
        series.num_prompt.observe(self._num_prompt)
        series.num_generated.observe(self._num_tokens)
        series.whole.observe(self._last_s - self._arrived_s)
        decode_s = self._last_s - self._first_s
        series.decode.observe(decode_s)
        series.inference.observe(self._last_s - self._started_s)
        if self._num_tokens > 1:
            series.per_token.observe(decode_s / (self._num_tokens - 1))
