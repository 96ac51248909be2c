"""How alike texts are, by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from analysis.probes.overlap import common_prefix, longest_common, rouge_l


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [("", "", 0), ("", "abc", 0), ("abcbdab", "bdcaba", 4), ("abc", "abc", 3), ("abc", "cba", 1)],
)
def test_longest_common_subsequences(a: str, b: str, length: int) -> None:
    assert longest_common(a, b) == length


def test_the_longest_common_subsequence_is_the_longest_of_all() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        a, b = (rng.integers(0, 3, 7).tolist() for _ in range(2))
        common = [
            set(itertools.combinations(items, length)) for items in (a, b) for length in range(8)
        ]
        expected = max(n for n in range(8) if common[n] & common[8 + n])
        assert longest_common(a, b) == expected


def test_rouge_l_is_the_f1_of_words() -> None:
    # "the cat mat" is common: 3 of 4 and 3 of 5 words.
    assert rouge_l("The cat, the mat", "the cat on a mat") == pytest.approx(6 / 9)
    assert rouge_l("same words", "Same words!") == 1
    assert rouge_l("", "") == 1
    assert rouge_l("...", "a") == 0


@pytest.mark.parametrize(
    ("a", "b", "length"), [([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2)]
)
def test_common_prefixes(a: list[int], b: list[int], length: int) -> None:
    assert common_prefix(a, b) == length
