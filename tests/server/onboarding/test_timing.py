from __future__ import annotations

from server.onboarding.timing import STAGES, Stopwatch


def test_stopwatch_adds_up_each_stage_and_leaves_pauses_out() -> None:
    now = 0.0
    watch = Stopwatch(lambda: now)
    watch.enter("hash")
    now = 2.0
    watch.enter("scan")
    now = 5.0
    watch.stop()
    now = 9.0
    watch.enter("hash")
    now = 9.5
    watch.stop()
    watch.stop()
    watch.add("move", 0.25)
    assert watch.spent == {"hash": 2.5, "scan": 3.0, "move": 0.25}


def test_record_has_every_stage_and_zero_for_those_skipped() -> None:
    watch = Stopwatch()
    watch.add("open", 1.5)
    assert watch.to_json() == {**dict.fromkeys(STAGES, 0.0), "open": 1.5}
