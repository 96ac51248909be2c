"""What the engine says of the device: every byte of the budget is somewhere."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from linker_core.engine.messages import Reserve, Snapshot
from tests.linker_core.engine.driving import SMALL, Driver, load_message
from tests.tiny import make_checkpoint

_BUDGET_BYTES = 1 << 24


def accounted(report: Snapshot) -> int:
    return (
        report.device_weight_bytes
        + report.device_kv_bytes
        + report.device_free_bytes
        + report.reserved_bytes
        + report.arriving_bytes
    )


def test_bytes_add_up_to_the_budget_while_a_model_is_loaded(tmp_path: Path) -> None:
    driver = Driver(replace(SMALL, memory_budget_bytes=_BUDGET_BYTES))
    engine = driver.engine
    assert engine.snapshot().device_free_bytes == accounted(engine.snapshot()) == _BUDGET_BYTES
    engine.handle(Reserve(name="tuner", nbytes=1000))
    clock = itertools.count()
    engine._loading._clock = lambda: float(next(clock))  # each slice moves one chunk only
    engine.handle(load_message("base", make_checkpoint(tmp_path / "base")))
    reports = []
    while engine.has_work:
        driver.step()
        reports.append(engine.snapshot())
    assert {accounted(report) for report in reports} == {_BUDGET_BYTES}
    assert {report.reserved_bytes for report in reports} == {1000}
    assert any(report.arriving_bytes for report in reports)
    assert reports[-1].arriving_bytes == 0
