from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from analysis.probes.blocks import (
    MLP,
    chosen_blocks,
    distance,
    pair_sums,
    read_block,
    symmetric_epsilon,
)
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint

A = np.array([[3.0, 4.0]], dtype=np.float32)
B = np.array([[4.0, 3.0]], dtype=np.float32)


def test_sums_of_a_pair_are_those_by_hand() -> None:
    sums = pair_sums(A, B)
    assert (sums.dot, sums.donor_square, sums.variant_square, sums.delta_square) == (24, 25, 25, 2)
    assert sums.cos == pytest.approx(24 / 25)
    assert sums.epsilon == pytest.approx(math.sqrt(2) / 5)
    assert symmetric_epsilon(sums) == pytest.approx(math.sqrt(2) / 10)


def test_sums_longer_than_a_chunk_are_exact() -> None:
    ones = np.ones((1 << 20) + 7, dtype=np.float32)
    sums = pair_sums(ones, 3 * ones)
    assert (sums.dot, sums.delta_square) == (3 * ones.size, 4 * ones.size)


def test_symmetric_epsilon_of_zeros_is_zero() -> None:
    assert symmetric_epsilon(pair_sums(0 * A, 0 * A)) == 0.0


def test_distance_is_the_mean_over_the_parts_tensors_only() -> None:
    base = {"mlp.x": A, "mlp.y": A, "self_attn.z": A}
    variant = {"mlp.x": A, "mlp.y": B, "self_attn.z": -A}
    found = distance(base, variant, MLP)
    assert found.cos == pytest.approx((1 + 24 / 25) / 2)
    assert found.epsilon == pytest.approx(math.sqrt(2) / 10)
    assert found.symmetric == pytest.approx(math.sqrt(2) / 20)


def test_a_block_has_all_parameters_of_its_layer_alone(tmp_path: Path) -> None:
    with Checkpoint.open(make_checkpoint(tmp_path / "m", layers=12)) as checkpoint:
        block = read_block(checkpoint, 1)
    assert len(block) == 12  # two norms, seven products, three biases; not those of layers 10, 11
    assert block["mlp.down_proj.weight"].shape == (48, 80)
    assert block["self_attn.k_proj.bias"].shape == (24,)


@pytest.mark.parametrize(
    ("stated", "expected"), [("middle", (4,)), ("all", tuple(range(8))), ("0, 7", (0, 7))]
)
def test_blocks_are_the_middle_one_all_or_those_named(
    stated: str, expected: tuple[int, ...]
) -> None:
    assert tuple(chosen_blocks(stated, 8)) == expected


@pytest.mark.parametrize("stated", ["8", "-1", "first", "", "1,,2"])
def test_blocks_that_are_no_layer_are_refused(stated: str) -> None:
    with pytest.raises(InvalidRequestError, match="from 0 to 7"):
        chosen_blocks(stated, 8)
