"""Alignment on trained weights: fine-tunes of one base agree, so nothing is flipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.kernel.kernel import build_kernel
from analysis.selection import select
from analysis.transfer.agreement import agreements
from analysis.transfer.side import Side


@pytest.mark.shared
def test_agreements_of_two_halves_of_a_family_are_far_above_chance(shared: Path) -> None:
    folder = shared / "families/mini-qwen2"
    halves = [("chat", "instruct"), ("math", "code")]
    with (
        StudiedFamily.open(folder / "base", {n: folder / n for n in halves[0]}) as one,
        StudiedFamily.open(folder / "base", {n: folder / n for n in halves[1]}) as other,
    ):
        names = select(one.base)
        own, source = (
            Side.of(f, build_kernel(gram_pass(f, names), names=f.names, seed=0))
            for f in (one, other)
        )
        found = agreements(own, source, names)["all"]
    assert (found.num_tensors, found.num_flipped) == (56, 0)
    assert found.cos_rms > 20 * found.chance_rms
