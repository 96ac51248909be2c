"""Compiled rounding beside the plain one, and what either must keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core.errors import BadCheckpointError
from linker_core.residency.coding import LEVELS
from linker_core.residency.rounding import assigned_codes, fitted_scales, joined, rounded
from linker_core.residency.rounding_kernel import load_rounding_loops

STARTS = (0.7, 1.0, 1.3)


def random_values(rows: int, width: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def square_left(
    values_RW: torch.Tensor, scales_RG: torch.Tensor, *, bits: int, group: int
) -> torch.Tensor:
    """What codes for these scales leave, for each row, in float64."""
    codes_RW = assigned_codes(values_RW, scales_RG, bits=bits, group=group)
    spread_RW = scales_RG.repeat_interleave(group, dim=1)[:, : values_RW.shape[1]]
    reached_RW = torch.tensor(LEVELS[bits])[codes_RW.int()] * spread_RW
    return (values_RW - reached_RW).double().square().sum(dim=1)


@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 300),
    bits=st.sampled_from(sorted(LEVELS)),
    group=st.sampled_from([32, 64, 128, 256]),
    seed=st.integers(0, 99),
)
def test_compiled_loops_agree_with_the_plain_form(
    rows: int, width: int, bits: int, group: int, seed: int
) -> None:
    values_RW = random_values(rows, width, seed=seed)
    loops = load_rounding_loops()
    plain_RG = fitted_scales(values_RW, bits=bits, group=group, starts=STARTS, refits=2)
    fitted_RG = loops.fit(values_RW, bits=bits, group=group, starts=STARTS, refits=2)
    # Where two scales are equally good either may be found, so what they leave is compared.
    left = square_left(values_RW, fitted_RG, bits=bits, group=group)
    plain_left = square_left(values_RW, plain_RG, bits=bits, group=group)
    torch.testing.assert_close(left, plain_left, rtol=1e-3, atol=1e-9)
    codes_RP = loops.assign(values_RW, plain_RG, bits=bits, group=group)
    codes_RW = assigned_codes(values_RW, plain_RG, bits=bits, group=group)
    ratios_RW = values_RW / plain_RG.repeat_interleave(group, dim=1)[:, :width]
    differing = codes_RP[:, :width] != codes_RW
    assert not codes_RP[:, width:].any()
    levels = torch.tensor(LEVELS[bits])
    middles = (levels[1:] + levels[:-1]) / 2
    for ratio in ratios_RW[differing].tolist():  # only what lies between two levels may differ
        assert float((middles - ratio).abs().min()) < 1e-6


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    values_RW = random_values(600, 700)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(rounded(values_RW, bits=3, group=64))
    one, many = found
    assert torch.equal(one.codes_RB, many.codes_RB)
    assert torch.equal(one.scales_RG, many.scales_RG)


def test_rows_are_rounded_alone() -> None:
    values_RW = random_values(20, 100)
    whole = rounded(values_RW, bits=4, group=64)
    parts = joined([rounded(values_RW[i : i + 7], bits=4, group=64) for i in (0, 7, 14)])
    assert torch.equal(whole.codes_RB, parts.codes_RB)
    assert torch.equal(whole.scales_RG, parts.scales_RG)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_scale_nearby_is_better(bits: int) -> None:
    values_RW = random_values(40, 64)
    found_RG = rounded(values_RW, bits=bits, group=64).scales_RG.float()
    left = square_left(values_RW, found_RG, bits=bits, group=64)
    for factor in (0.8, 0.9, 1.1, 1.25):
        other = square_left(values_RW, found_RG * factor, bits=bits, group=64)
        assert float((left <= other).double().mean()) > 0.85, factor
        assert left.sum() < other.sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bits: int, bad: float) -> None:
    values_RW = random_values(3, 100)
    values_RW[1, 70] = bad
    with pytest.raises(BadCheckpointError, match="not finite"):
        rounded(values_RW, bits=bits, group=100 if bits == 8 else 32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
def test_zeros_stay_zeros(bits: int) -> None:
    values_RW = random_values(2, 128)
    values_RW[0, 32:96] = 0
    values_RW[1] = 0
    decoded = rounded(values_RW, bits=bits, group=128 if bits == 8 else 32).decoded()
    assert not decoded[1].any()
    assert not decoded[0, 32:96].any()


@pytest.mark.parametrize("width", [1, 15, 16, 100])
def test_eight_bits_miss_by_half_a_step_at_most(width: int) -> None:
    values_RW = random_values(5, width)
    matrix = rounded(values_RW, bits=8, group=width)
    # The scale is rounded to bfloat16: the greatest value may lie 127 such errors further off.
    steps_R1 = matrix.scales_RG.float() * (0.5 + 127 / 256)
    assert bool(((matrix.decoded() - values_RW).abs() <= steps_R1).all())
