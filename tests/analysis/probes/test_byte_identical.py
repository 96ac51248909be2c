from __future__ import annotations

import math
from pathlib import Path

import pytest

from analysis.family import StudiedFamily
from analysis.probes import byte_identical
from tests.analysis.probes.columns import numbers, records
from tests.tiny import make_checkpoint, make_variant

UP = "model.layers.1.mlp.up_proj.weight"


def test_one_changed_tensor_is_all_that_a_store_keeps_again(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32")
    first = make_variant(tmp_path / "first", base, scale={UP: 0.5})
    second = make_variant(tmp_path / "second", base, scale={UP: 0.5})
    with StudiedFamily.open(base, {"first": first, "second": second}) as family:
        result = byte_identical.measure(family)
        total = sum(math.prod(tensor.shape) for tensor in family.base.tensors.values())
    one, two = records(result)
    changed = 80 * 48 / total
    assert (one["tensors"], one["identical_tensors"]) == (26, 25)
    assert one["hash_saved"] == pytest.approx(1 - changed)
    assert one["unchanged_elements"] == pytest.approx(1 - changed, abs=1e-4)
    # One of 24 tensors in the blocks has ε 0.5, the others none.
    assert one["epsilon"] == pytest.approx(0.5 / 24, rel=1e-3)
    assert two["hash_saved"] == 1.0  # the same deltas: the store has them of the first
    assert two["identical_tensors"] == 25


def test_a_delta_below_the_rounding_of_the_type_leaves_most_bits(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="bfloat16")
    tiny = make_variant(tmp_path / "tiny", base, scale=1e-4)
    large = make_variant(tmp_path / "large", base, scale=0.1)
    with StudiedFamily.open(base, {"tiny": tiny, "large": large}) as family:
        unchanged = numbers(byte_identical.measure(family), "unchanged_elements")
    # bfloat16 steps by 2^-8 to 2^-7 of a value.
    assert unchanged[0] > 0.9
    assert unchanged[1] < 0.1


def test_a_copy_of_another_type_is_no_copy_to_a_store(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="bfloat16", seed=0)
    wide = make_checkpoint(tmp_path / "wide", dtype="float32", seed=0)
    with StudiedFamily.open(base, {"wide": wide}) as family:
        [row] = records(byte_identical.measure(family))
    assert (row["identical_tensors"], row["hash_saved"]) == (0, 0.0)
    assert row["unchanged_elements"] is None


@pytest.mark.shared
def test_training_left_no_tensor_of_a_real_family_untouched(mini: StudiedFamily) -> None:
    result = byte_identical.measure(mini)
    assert numbers(result, "identical_tensors") == [0, 0, 0, 0]
    assert numbers(result, "hash_saved") == [0, 0, 0, 0]
    instruct, chat, math_, code = numbers(result, "cos")
    assert min(instruct, chat, math_) > 0.99 > code
