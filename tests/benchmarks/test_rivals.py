from __future__ import annotations

import math

import pytest
import torch

from tests.benchmarks.rivals import (
    Form,
    alias,
    low_rank,
    one_scale,
    own_codes,
    round_to_nearest,
    sparse,
)


def pair(rows: int = 32, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    donor = torch.randn(rows, width, generator=generator)
    return donor, donor + 0.1 * torch.randn(rows, width, generator=generator)


def error_of(form: Form) -> float:
    """Of the delta, squared, as a share of the delta's own square."""
    donor, variant = pair()
    rebuilt = form("w", donor, variant).weight_OI
    return float((rebuilt - variant).square().sum() / (variant - donor).square().sum())


def test_alias_is_the_donor_for_nothing() -> None:
    donor, variant = pair()
    weight, num_bits = alias("w", donor, variant)
    assert torch.equal(weight, donor)
    assert num_bits == 0


def test_low_rank_of_a_delta_of_that_rank_is_the_delta_to_bfloat16() -> None:
    donor, _ = pair()
    delta = torch.outer(torch.arange(1.0, 33), torch.ones(128))
    weight, num_bits = low_rank(1)("w", donor, donor + delta)
    torch.testing.assert_close(weight - donor, delta, rtol=0.02, atol=1e-3)
    assert num_bits == 16 * (32 + 128)


def test_one_scale_takes_a_bit_a_weight_and_keeps_signs_at_the_mean() -> None:
    donor = torch.zeros(2, 2)
    variant = torch.tensor([[1.0, -3.0], [2.0, -2.0]])
    weight, num_bits = one_scale()("w", donor, variant)
    assert torch.equal(weight, torch.tensor([[2.0, -2.0], [2.0, -2.0]]))
    assert num_bits == 4 + 16
    halved = one_scale(lambda _name, _delta: 0.5)("w", donor, variant)
    assert torch.equal(halved.weight_OI, torch.tensor([[0.5, -0.5], [0.5, -0.5]]))


def test_one_scale_of_normal_deltas_leaves_what_signs_must() -> None:
    # At the mean of |delta|, E(|d| - E|d|)² = 1 - 2/π of the square.
    assert error_of(one_scale()) == pytest.approx(1 - 2 / math.pi, rel=0.05)


def test_sparse_keeps_the_two_larger_of_four() -> None:
    donor = torch.zeros(1, 8)
    variant = torch.tensor([[1.0, -4.0, 2.0, 5.0, 0.0, 0.1, -3.0, 6.0]])
    weight, num_bits = sparse(4, group=4)("w", donor, variant)
    assert (weight != 0).tolist() == [[False, True, False, True, False, False, True, True]]
    torch.testing.assert_close(weight, variant * (weight != 0), rtol=0.1, atol=0.1)
    assert num_bits == 4 * 2 + 4 * 4 + 16  # places, codes, a scale


def test_own_codes_lean_on_no_donor() -> None:
    donor, variant = pair()
    form = own_codes(4)
    assert torch.equal(form("w", donor, variant)[0], form("w", -donor, variant)[0])


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_round_to_nearest_is_as_good_as_even_levels_can_be(bits: int, error: float) -> None:
    # Max (1960), table II: of a normal variable; a group's own best clipping is a little better.
    values = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    rounded, num_bits = round_to_nearest(values, bits, group=64)
    share = float((rounded - values).square().sum() / values.square().sum())
    assert 0.75 * error < share < 1.05 * error
    assert num_bits == values.numel() * bits + 4096 * 16


def test_round_to_nearest_of_nothing_is_nothing() -> None:
    rounded, _ = round_to_nearest(torch.zeros(2, 64), 2, group=64)
    assert rounded.abs().max() < 1e-30
