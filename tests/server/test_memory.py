"""Memory from outside: N models cost Σ unique bytes, nothing is held twice, admission peaks low."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.memory import MIB, make_family, measure

SLACK_BYTES = 64 * MIB


def test_process_tree_grows_by_the_unique_bytes_alone(tmp_path: Path) -> None:
    donor, *copies = measure(make_family(tmp_path), state=tmp_path / "state")
    assert donor.unique_bytes == donor.logical_bytes > 390 * MIB
    unique = sum(copy.unique_bytes for copy in copies)
    assert unique < 0.3 * donor.logical_bytes  # the copies do alias: a full copy would be seen
    growth = copies[-1].steady_bytes - donor.steady_bytes
    assert abs(growth - unique) <= 0.05 * unique + SLACK_BYTES
    before = donor.steady_bytes
    for copy in copies:
        assert copy.peak_bytes - before <= copy.unique_bytes + SLACK_BYTES
        before = copy.steady_bytes
