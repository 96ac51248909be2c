"""The planted families hold what they say."""

from __future__ import annotations

import numpy as np

from analysis.gram import gram_pass
from analysis.selection import select
from tests.analysis.planted import Planted, Structure, expected_gram


def test_planted_grams_are_those_of_the_closed_form(small_family: Planted) -> None:
    with small_family.open() as family:
        names = select(family.base)
        assert set(names) == set(small_family.grams_NN)
        for found in gram_pass(family, names):
            expected_NN = expected_gram(Structure(), base_square=found.base_square)
            scale = expected_NN.diagonal().max()
            assert np.allclose(small_family.grams_NN[found.name], expected_NN, atol=1e-12 * scale)
            assert np.allclose(found.gram_NN, expected_NN, atol=1e-5 * scale)
