"""The summary that metrics and the page are tried on is one that a study could have come to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.selection import select
from analysis.study import study_tensor
from analysis.summary import summarise
from tests.analysis.planted import Structure, plant_family
from tests.server.summaries import summary_of


@pytest.mark.parametrize("num_variants", [2, 4])
def test_summary_has_the_fields_of_a_real_one(tmp_path: Path, num_variants: int) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=num_variants))
    with StudiedFamily.open(planted.base, planted.variants) as family:
        names = family.names
        studies = [
            study_tensor(gram, names=names, seed=0, num_draws=20)
            for gram in gram_pass(family, select(family.base))
        ]
    real = summarise(studies, base="base", names=names, seed=0, num_draws=20)
    assert list(differences(summary_of("base", *names), real)) == []


def differences(ours: Any, real: Any, at: str = "summary") -> Iterator[str]:
    """Yields every field of ours that a real summary lacks, or is null in one of them alone."""
    if isinstance(ours, dict) and isinstance(real, dict):
        for name, value in ours.items():
            if name not in real:
                yield f"{at}.{name} is not there"
            else:
                yield from differences(value, real[name], f"{at}.{name}")
    elif type(ours) is not type(real):
        yield f"{at} is {type(ours).__name__} and really {type(real).__name__}"
