"""BS Eq. 1 and 2 against closed forms and against plain float64 arithmetic on whole tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from linker_core.errors import BadCheckpointError
from linker_core.sharing import pieces
from linker_core.sharing.scan import scan
from linker_core.sharing.similarity import PairSums
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint

NAME = "model.embed_tokens.weight"


def compared(
    tmp_path: Path, a: torch.Tensor, b: torch.Tensor, *, hidden: int = 48, mapped: bool = True
) -> PairSums:
    """Writes both tensors into twin checkpoints and compares what is read back."""
    checkpoints = []
    for label, tensor in (("a", a), ("b", b)):
        path = make_checkpoint(tmp_path / label, vocab_size=512, hidden=hidden)
        state = load_file(path / "model.safetensors")
        rows = tensor.numel() // hidden
        state[NAME] = tensor.reshape(rows, hidden).contiguous()
        record = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(record | {"vocab_size": rows}))
        save_file(state, path / "model.safetensors")
        checkpoints.append(Checkpoint.open(path))
    with checkpoints[0] as donor, checkpoints[1] as variant:
        return scan(donor, variant, mapped=mapped).outside_blocks[NAME]


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces a tensor, the last one ragged."""
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 48 * 300)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compare_random_tensors_equals_whole_float64_arithmetic(
    tmp_path: Path, dtype: torch.dtype, mapped: bool
) -> None:
    count = 48 * 4000
    a = normal(count, 0).to(dtype)
    b = (normal(count, 0) + 0.02 * normal(count, 1)).to(dtype)
    sums = compared(tmp_path, a, b, mapped=mapped)
    x, y = a.double().numpy(), b.double().numpy()
    assert sums.cos == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
    assert sums.epsilon == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert not sums.identical


def test_compare_scaled_copy_has_cosine_one_and_epsilon_of_the_scale(tmp_path: Path) -> None:
    a = normal(48 * 512, 0).bfloat16()
    sums = compared(tmp_path, a, a * 2)  # a doubled bfloat16 is exact
    assert sums.cos == pytest.approx(1.0, abs=1e-15)
    assert sums.epsilon == pytest.approx(1.0, abs=1e-15)


def test_compare_negated_copy_has_cosine_minus_one_and_epsilon_two(tmp_path: Path) -> None:
    a = normal(48 * 512, 0).bfloat16()
    sums = compared(tmp_path, a, -a)
    assert sums.cos == pytest.approx(-1.0)
    assert sums.epsilon == pytest.approx(2.0)


def test_compare_orthogonal_delta_has_the_cosine_of_pythagoras(tmp_path: Path) -> None:
    a = torch.zeros(48 * 512)
    delta = torch.zeros(48 * 512)
    a[:3000], delta[3000:6000] = 4.0, 3.0
    sums = compared(tmp_path, a, a + delta)
    assert sums.cos == pytest.approx(4 / 5, abs=1e-15)
    assert sums.epsilon == pytest.approx(3 / 4, abs=1e-15)


def test_compare_identical_tensors_are_identical(tmp_path: Path) -> None:
    a = normal(48 * 512, 0).bfloat16()
    sums = compared(tmp_path, a, a.clone())
    assert sums.identical
    assert (sums.cos, sums.epsilon) == (1.0, 0.0)


def test_compare_equal_values_in_other_words_are_not_identical(tmp_path: Path) -> None:
    a = torch.zeros(48 * 512, dtype=torch.bfloat16)
    a[5] = 1
    b = a.clone()
    b[7] = -0.0
    sums = compared(tmp_path, a, b)
    assert sums.epsilon == 0.0
    assert not sums.identical


def test_compare_equal_values_of_other_types_are_not_identical(tmp_path: Path) -> None:
    a = normal(48 * 512, 0).bfloat16()
    sums = compared(tmp_path, a, a.float())
    assert sums.epsilon == 0.0
    assert not sums.identical


@pytest.mark.parametrize(
    ("a_zero", "b_zero", "cos", "epsilon"),
    [(True, True, 1.0, 0.0), (True, False, 0.0, 1.0), (False, True, 0.0, 1.0)],
)
def test_compare_zero_norms_follow_the_convention(
    tmp_path: Path, a_zero: bool, b_zero: bool, cos: float, epsilon: float
) -> None:
    a = torch.zeros(48 * 512) if a_zero else normal(48 * 512, 0)
    b = torch.zeros(48 * 512) if b_zero else normal(48 * 512, 1)
    sums = compared(tmp_path, a, b)
    assert (sums.cos, sums.epsilon) == (cos, epsilon)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e18, 3e38])
def test_compare_extreme_magnitudes_neither_vanish_nor_overflow(
    tmp_path: Path, magnitude: float
) -> None:
    a = (normal(48 * 512, 0).clamp(-1, 1) * magnitude).float()
    b = (a.double() * 0.5).float()
    sums = compared(tmp_path, a, b)
    assert sums.cos == pytest.approx(1.0, abs=1e-6)
    assert sums.epsilon == pytest.approx(0.5, abs=1e-6)


def test_compare_small_delta_on_large_values_is_summed_directly(tmp_path: Path) -> None:
    # Expanding |a-b|² as |a|² - 2<a,b> + |b|² loses this delta in the rounding of 10^12.
    a = torch.full((48 * 512,), 8192.0)
    b = a.clone()
    b[::48] += 0.0009765625
    sums = compared(tmp_path, a, b)
    assert sums.delta_square == pytest.approx(512 * 0.0009765625**2, rel=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_compare_counts_nonfinite_values_of_the_variant(tmp_path: Path, poison: float) -> None:
    a = normal(48 * 4000, 0).bfloat16()
    b = a.clone()
    b[[3, 100_000, 191_999]] = poison
    with pytest.raises(BadCheckpointError, match=r"3 seen"):
        compared(tmp_path, a, b)
