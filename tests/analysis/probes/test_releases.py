"""Regions of all pairs, and releases held against each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.family import StudiedFamily
from analysis.probes import regions, version_over_version
from linker_core.errors import InvalidRequestError
from tests.analysis.probes.columns import numbers, records
from tests.tiny import make_checkpoint, make_variant


def test_regions_hold_base_to_variant_and_variant_to_variant(family: StudiedFamily) -> None:
    near, far, cross = records(regions.measure(family))
    assert (near["pair"], near["kind"], near["region"]) == (
        "base → near",
        "from the base",
        "aligned",
    )
    assert near["epsilon"] == pytest.approx(0.01, rel=1e-4)
    assert (far["pair"], far["region"]) == ("base → far", "outside")
    assert (cross["pair"], cross["kind"], cross["region"]) == (
        "near → far",
        "cross-variant",
        "outside",
    )
    # Independent deltas of 0.01 and 0.3 of the base's norm; the first also divides.
    assert cross["epsilon"] == pytest.approx((0.3**2 + 0.01**2) ** 0.5, rel=0.01)
    assert cross["cos"] == pytest.approx(1 / (1.0001 * 1.09) ** 0.5, abs=5e-3)


def test_a_later_release_that_moved_less_is_tighter(tmp_path: Path, family: StudiedFamily) -> None:
    base = make_checkpoint(tmp_path / "v2", architecture="llama", dtype="float32", layers=2)
    tuned = make_variant(tmp_path / "v2-chat", base, scale=0.002)
    result = version_over_version.measure(family, [(base, tuned)])
    assert [row["release"] for row in records(result)] == ["near", "far", "v2-chat"]
    assert numbers(result, "epsilon") == pytest.approx([0.01, 0.3, 0.002], rel=1e-3)
    assert numbers(result, "tightening") == pytest.approx([1, 1 / 30, 5], rel=1e-3)


def test_a_release_that_did_not_move_has_no_tightening(family: StudiedFamily) -> None:
    base = family.base.path
    [*_, copy] = records(version_over_version.measure(family, [(base, base)]))
    assert (copy["release"], copy["tightening"]) == ("base", None)


def test_two_releases_of_one_name_are_refused(family: StudiedFamily) -> None:
    pair = (family.base.path, family.variants["near"].path)
    with pytest.raises(InvalidRequestError, match="'near'"):
        version_over_version.measure(family, [pair])


@pytest.mark.shared
def test_continued_pre_training_leaves_every_neighbourhood(mini: StudiedFamily) -> None:
    by_pair = {str(row["pair"]): row["region"] for row in records(regions.measure(mini))}
    assert len(by_pair) == 10
    assert {region for pair, region in by_pair.items() if "code" in pair} == {"outside"}
    assert {region for pair, region in by_pair.items() if "code" not in pair} == {"aligned"}
