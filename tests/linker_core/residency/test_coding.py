"""Codes as they are stored: their layout, their levels, and what they decode to."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linker_core.residency.coding import LEVELS, CodedMatrix, pack_codes, unpack_codes
from linker_core.residency.rounding import rounded

NORMAL = NormalDist()


def random_codes(rows: int, width: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1_000 + width)
    return torch.randint(2**bits, (rows, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_the_best_for_a_normal_variable(bits: int) -> None:
    levels = LEVELS[bits]
    edges = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
    bounds = [-math.inf, *edges, math.inf]
    for level, low, high in zip(levels, bounds[:-1], bounds[1:], strict=True):
        mass = NORMAL.cdf(high) - NORMAL.cdf(low)
        # Lloyd and Max: a level is the mean of what is nearest to it, here in bfloat16.
        mean = (NORMAL.pdf(low) - NORMAL.pdf(high)) / mass
        assert level == pytest.approx(mean, rel=2**-7)
        assert level == float(torch.tensor(level).bfloat16())


@given(rows=st.integers(1, 4), width=st.integers(1, 300), bits=st.sampled_from([1, 2, 3, 4]))
def test_packed_codes_come_back_with_zeros_behind_them(rows: int, width: int, bits: int) -> None:
    codes_RW = random_codes(rows, width, bits)
    unpacked = unpack_codes(pack_codes(codes_RW, bits), bits)
    assert torch.equal(unpacked[:, :width], codes_RW)
    assert not unpacked[:, width:].any()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_byte_of_a_chunk_holds_every_sixteenth_weight(bits: int) -> None:
    codes_RW = random_codes(2, 256, bits)
    packed = pack_codes(codes_RW, bits)
    per_byte = 8 // bits
    for row in range(2):
        for place, byte in enumerate(packed[row].tolist()):
            chunk, lane = divmod(place, 16)
            weights = [chunk * 16 * per_byte + lane + 16 * i for i in range(per_byte)]
            expected = sum(
                int(codes_RW[row, weight]) << (bits * i) for i, weight in enumerate(weights)
            )
            assert byte == expected


def test_three_bits_lie_as_two_and_one() -> None:
    codes_RW = random_codes(2, 256, 3)
    runs = pack_codes(codes_RW, 3).view(2, 2, 48)
    assert torch.equal(runs[:, :, :32].flatten(1), pack_codes(codes_RW & 3, 2))
    assert torch.equal(runs[:, :, 32:].flatten(1), pack_codes(codes_RW >> 2, 1))


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 200),
    bits=st.sampled_from([1, 2, 3, 4, 8, 16]),
    group=st.sampled_from([32, 64, 128]),
)
def test_decoded_rows_and_columns_are_parts_of_the_whole(
    rows: int, width: int, bits: int, group: int
) -> None:
    matrix = rounded(torch.randn(rows, width), bits=bits, group=width if bits == 8 else group)
    whole_RW = matrix.decoded()
    assert whole_RW.shape == (rows, width)
    some = torch.tensor([rows - 1, 0])
    assert torch.equal(matrix.decoded(some), whole_RW[some])
    columns = torch.tensor([width - 1, 0, width // 2])
    assert torch.equal(matrix.columns(columns), whole_RW[:, columns])


def test_values_are_levels_times_the_scale_of_their_group() -> None:
    codes_RW = torch.arange(16, dtype=torch.uint8).repeat(4)[None]  # 64 weights, two groups
    matrix = CodedMatrix(
        bits=4,
        group=32,
        width=64,
        codes_RB=pack_codes(codes_RW, 4),
        scales_RG=torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16),
    )
    levels = torch.tensor(LEVELS[4]).repeat(2)
    assert torch.equal(matrix.decoded()[0], torch.cat([0.5 * levels, 2.0 * levels]))
    assert matrix.nbytes == 128 * 4 // 8 + 2 * 2
