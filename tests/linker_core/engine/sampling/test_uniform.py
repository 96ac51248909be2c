"""The numbers of a seed."""

from __future__ import annotations

import numpy as np

from linker_core.engine.sampling.uniform import uniforms

MASK = 2**64 - 1


def mix(word: int) -> int:
    """SplitMix64's output function in Python's integers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


def test_uniforms_are_splitmix_of_the_scrambled_seed() -> None:
    gamma = 0x9E3779B97F4A7C15
    for seed in (0, 1, 7, MASK):
        state = mix(seed + gamma & MASK)
        want = [(mix(state + gamma * (place + 1) & MASK) >> 11) / 2**53 for place in range(5)]
        assert uniforms([seed] * 5, list(range(5))).tolist() == want


def test_splitmix_mixes_as_published() -> None:
    # The first outputs of the reference implementation for seed 1234567.
    gamma = 0x9E3779B97F4A7C15
    outputs = [mix(1234567 + gamma * (n + 1) & MASK) for n in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_are_even_over_seeds_and_over_places() -> None:
    for seeds, places in (([3] * 20_000, range(20_000)), (range(20_000), [3] * 20_000)):
        numbers = uniforms(list(seeds), list(places))
        counts, _ = np.histogram(numbers, bins=20, range=(0.0, 1.0))
        # Chi-squared with 19 degrees of freedom: its mean plus five standard deviations.
        assert ((counts - 1000) ** 2 / 1000).sum() < 19 + 5 * (2 * 19) ** 0.5
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
