"""The soak of `python -m tests.benchmarks.soak`, short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.soak import soak


@pytest.mark.slow
def test_soak_ends_with_right_answers_and_no_page_held(tmp_path: Path) -> None:
    summary = soak(tmp_path, duration_s=20)
    assert summary["problems"] == []
    assert summary["held_pages_ratio"] == 0
    assert summary["compared"]["wrong"] == 0
    assert summary["compared"]["distinct_greedy"] > 10
    # What makes it a soak: other plans, clients that leave, waits for pages, shared prefixes.
    assert len({blocks["alias"] for blocks in summary["blocks"].values()}) > 2
    assert summary["requests"]["leave stream"] > 0
    assert summary["requests"]["bad"] > 0
    assert summary["prefix_hit_ratio"] > 0
