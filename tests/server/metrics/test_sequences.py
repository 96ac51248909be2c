"""What is counted and timed of one sequence, by a clock that only the tests move."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from server.metrics.sequences import SequenceMeter
from server.metrics.serving import Counted, ServingMetrics
from server.metrics.view import View

VIEW = View(models=(), snapshot=None, engine_up=True, engine_restarts=0)
PHASES = ("queue", "prefill", "decode", "inference")


class World:
    """Metrics of a model `m`, with a clock."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.metrics = ServingMetrics(
            CollectorRegistry(), rejection_reasons=(), clock=lambda: self.now_s
        )
        self.metrics.add_model("m")

    def submit(self, *, num_prompt: int = 7, after_s: float = 0.5) -> SequenceMeter:
        """A sequence whose request arrived a while ago."""
        return self.metrics.follow("m", num_prompt=num_prompt, arrived_s=self.now_s - after_s)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    def read(self, name: str, **labels: str) -> float:
        """A sample of the model, as a Prometheus reads it."""
        wanted = {"model": "m", **labels}
        (value,) = (
            sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
            if sample.name == name and sample.labels == wanted
        )
        return value

    def text(self) -> str:
        return "".join(self.metrics.render(VIEW))

    def seen(self, family: str) -> tuple[float, float]:
        """Count and sum of a histogram."""
        return self.read(f"linker_{family}_count"), self.read(f"linker_{family}_sum")


@pytest.fixture
def world() -> World:
    return World()


def test_phases_follow_one_another_from_submission_to_the_last_token(world: World) -> None:
    meter = world.submit(after_s=0.5)
    world.wait(3.0)
    meter.came([world.now_s], queued_s=2.0)
    world.wait(0.25)
    meter.came([world.now_s])
    world.wait(0.75)
    meter.came([world.now_s])
    world.wait(0.125)  # the answer is sent, and read by whoever asked
    meter.ended("length")
    assert world.seen("time_to_first_token_seconds") == (1, 3.5)
    assert [world.seen(f"request_{phase}_time_seconds") for phase in PHASES] == [
        (1, 2.0), (1, 1.0), (1, 1.0), (1, 2.0),
    ]  # fmt: skip
    assert world.seen("e2e_request_latency_seconds") == (1, 0.5 + 3.0 + 1.0)
    assert world.seen("inter_token_latency_seconds") == (2, 1.0)
    assert world.seen("request_time_per_output_token_seconds") == (1, 0.5)
    assert world.seen("request_prompt_tokens") == (1, 7)
    assert world.seen("request_generation_tokens") == (1, 3)


def test_tokens_that_waited_for_their_reader_keep_their_own_gaps(world: World) -> None:
    meter = world.submit()
    first_s = world.now_s + 1.0
    world.wait(60.0)  # the client reads nothing
    meter.came([first_s, first_s + 0.25], queued_s=0.5)
    world.wait(60.0)
    meter.came([first_s + 0.5, first_s + 0.75, first_s + 2.0])
    world.wait(60.0)
    meter.ended("stop")
    assert world.seen("time_to_first_token_seconds") == (1, 1.5)
    assert world.seen("inter_token_latency_seconds") == (4, 2.0)
    assert world.read("linker_inter_token_latency_seconds_bucket", le="0.25") == 3
    assert [world.seen(f"request_{phase}_time_seconds") for phase in PHASES] == [
        (1, 0.5), (1, 0.5), (1, 2.0), (1, 2.5),
    ]  # fmt: skip
    assert world.seen("request_time_per_output_token_seconds") == (1, 0.5)
    assert world.seen("e2e_request_latency_seconds") == (1, 3.5)


def test_tokens_that_come_with_the_first_took_no_time(world: World) -> None:
    meter = world.submit()
    world.wait(1.0)
    meter.came([world.now_s] * 3, queued_s=0.0)
    meter.ended("stop")
    assert world.seen("inter_token_latency_seconds") == (2, 0.0)
    assert world.seen("request_decode_time_seconds") == (1, 0.0)
    assert world.seen("request_time_per_output_token_seconds") == (1, 0.0)


def test_single_token_has_no_gap_and_no_time_per_token(world: World) -> None:
    meter = world.submit()
    meter.came([world.now_s], queued_s=0.0)
    meter.ended("length")
    assert world.seen("inter_token_latency_seconds") == (0, 0)
    assert world.seen("request_time_per_output_token_seconds") == (0, 0)
    assert world.seen("request_decode_time_seconds") == (1, 0)


def test_prompt_that_asked_for_no_answer_is_processed_and_generates_nothing(world: World) -> None:
    meter = world.submit(num_prompt=7)
    world.wait(1.0)
    meter.began(world.now_s, 0.25)
    meter.ended("length")
    assert world.metrics.counted("m") == Counted(7, 0, 1)
    assert world.seen("request_generation_tokens") == (1, 0)
    assert world.seen("request_queue_time_seconds") == (1, 0.25)
    assert world.seen("request_prefill_time_seconds") == (1, 0.75)
    assert world.seen("inter_token_latency_seconds") == (0, 0)
    assert world.seen("request_time_per_output_token_seconds") == (0, 0)


def test_gaps_of_a_sequence_add_up_to_its_decode_time(world: World) -> None:
    meter = world.submit()
    meter.came([world.now_s] * 2, queued_s=0.0)
    for gap_s, num_tokens in ((0.5, 3), (0.25, 1), (1.0, 5)):
        world.wait(gap_s)
        meter.came([world.now_s] * num_tokens)
    meter.ended("length")
    num_gaps, gaps_s = world.seen("inter_token_latency_seconds")
    assert num_gaps == 10
    assert gaps_s == pytest.approx(1.75)
    assert world.seen("request_decode_time_seconds") == (1, 1.75)


def test_queue_never_lasts_longer_than_the_first_token_took(world: World) -> None:
    meter = world.submit()
    world.wait(1.0)
    meter.came([world.now_s], queued_s=1.5)  # by another clock
    assert world.seen("request_queue_time_seconds") == (1, 1.0)
    assert world.seen("request_prefill_time_seconds") == (1, 0.0)


def test_tokens_are_counted_as_they_come(world: World) -> None:
    meter = world.submit(num_prompt=7)
    assert world.metrics.counted("m") == Counted()
    meter.came([world.now_s], queued_s=0.0)
    assert world.read("linker_prompt_tokens_total") == 7
    meter.came([world.now_s] * 2)
    assert world.read("linker_generation_tokens_total") == 3
    assert world.metrics.counted("m") == Counted(7, 3, 0)
    meter.ended("length")
    assert world.metrics.counted("m") == world.metrics.total == Counted(7, 3, 1)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_sequence_that_was_cut_off_says_nothing_of_how_long_answers_take(
    world: World, reason: str
) -> None:
    meter = world.submit()
    meter.came([world.now_s], queued_s=0.0)
    world.wait(1.0)
    meter.came([world.now_s])
    meter.ended(reason)
    assert world.read("linker_request_success_total", finished_reason=reason) == 1
    for family in (
        "e2e_request_latency_seconds", "request_decode_time_seconds",
        "request_inference_time_seconds", "request_time_per_output_token_seconds",
        "request_prompt_tokens", "request_generation_tokens",
    ):  # fmt: skip
        assert world.seen(family) == (0, 0), family
    assert world.seen("time_to_first_token_seconds")[0] == 1
    assert world.seen("inter_token_latency_seconds") == (1, 1.0)


def test_sequence_without_a_token_is_counted_alone(world: World) -> None:
    world.submit().ended("abort")
    assert world.read("linker_request_success_total", finished_reason="abort") == 1
    assert world.metrics.counted("m") == Counted(0, 0, 1)
    assert world.seen("request_queue_time_seconds") == (0, 0)


def test_of_a_deleted_model_totals_alone_are_kept(world: World) -> None:
    first, late = world.submit(), world.submit()
    first.came([world.now_s] * 2, queued_s=0.0)
    first.ended("length")
    world.metrics.remove_model("m")
    late.came([world.now_s] * 5, queued_s=0.0)
    late.ended("length")
    assert 'model="m"' not in world.text()
    assert world.metrics.counted("m") == Counted()
    assert world.metrics.total == Counted(7, 2, 1)
    unknown = world.metrics.follow("m", num_prompt=1, arrived_s=0.0)
    unknown.came([world.now_s], queued_s=0.0)
    world.metrics.add_model("m")
    assert world.read("linker_generation_tokens_total") == 0
    assert world.metrics.total == Counted(7, 2, 1)


def test_model_that_is_shown_again_keeps_its_counts(world: World) -> None:
    world.submit().came([world.now_s], queued_s=0.0)
    world.metrics.add_model("m")
    assert world.read("linker_generation_tokens_total") == 1


def test_removing_an_unknown_model_changes_nothing(world: World) -> None:
    world.metrics.remove_model("nobody")
    assert world.metrics.total == Counted()
