from __future__ import annotations

import math

import pytest

from tests.benchmarks.baseline_tables import Line, kl_at, tables


def line(bits: float, kl: float, *, form: str = "form", family: str = "ours, policy bytes") -> Line:
    return Line(
        variant="chat",
        family=family,
        form=form,
        bits_per_weight=bits,
        kl=kl,
        top1=0.9,
        ppl_ratio=1.01,
        accuracy=0.25,
    )


PLANS = [line(1.0, 0.1), line(2.0, 0.001), line(1.5, 0.2)]  # the last is beaten by the first


@pytest.mark.parametrize(
    ("bits", "kl"),
    [(0.9, None), (1.0, 0.1), (1.5, 0.01), (2.0, 0.001), (7.0, 0.001)],
)
def test_kl_between_two_plans_is_even_in_its_logarithm(bits: float, kl: float | None) -> None:
    found = kl_at(PLANS, bits)
    assert (found is None) == (kl is None)
    assert found is None or kl is None or math.isclose(found, kl)


def test_table_sets_ours_beside_others_alone() -> None:
    printed = list(tables([line(1.5, 0.5, form="theirs", family="BitDelta"), *PLANS]))
    [theirs] = [row for row in printed if "theirs" in row]
    assert theirs == "| theirs | 1.50 | 0.50000 | 0.01000 | 0.900 | 1.010 | 0.250 |"
    assert len([row for row in printed if "|  | 0.900" in row]) == len(PLANS)
