from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from analysis.family import StudiedFamily
from analysis.probes import low_rank
from linker_core.errors import InvalidRequestError
from tests.analysis.probes.columns import records
from tests.tiny import make_checkpoint, make_variant, save_state


def _rank_by_svd(delta: np.ndarray, tolerance: float) -> int:
    u, s, v = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    for rank in range(len(s) + 1):
        rest = delta - (u[:, :rank] * s[:rank]) @ v[:rank]
        if np.linalg.norm(rest) <= tolerance * np.linalg.norm(delta):
            return rank
    return len(s)


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    # Singular values 10, 1, 0.1: |Δ|² = 101.01, and 0.1000, 0.00995 of |Δ| remain after 1 and 2.
    [(0.5, 1), (0.11, 1), (0.05, 2), (0.01, 2), (0.009, 3)],
)
def test_the_least_rank_of_known_singular_values(tolerance: float, expected: int) -> None:
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((9, 3)))
    right, _ = np.linalg.qr(rng.standard_normal((5, 3)))
    delta = ((left * [10, 1, 0.1]) @ right.T).astype(np.float32)
    assert low_rank.least_rank(delta, tolerance) == expected
    assert low_rank.least_rank(np.ascontiguousarray(delta.T), tolerance) == expected


@pytest.mark.parametrize("shape", [(30, 30), (1500, 20), (20, 1500)])
@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_the_least_rank_is_that_of_a_whole_svd(shape: tuple[int, int], tolerance: float) -> None:
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    assert low_rank.least_rank(delta, tolerance) == _rank_by_svd(delta, tolerance)


def test_no_delta_needs_no_rank() -> None:
    assert low_rank.least_rank(np.zeros((4, 7), dtype=np.float32), 0.05) == 0


def test_planted_rank_one_deltas_take_what_their_factors_take(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32", layers=2)
    thin = make_variant(tmp_path / "thin", base, scale={})
    full = make_variant(tmp_path / "full", base, scale=0.1)
    state = load_file(thin / "model.safetensors")
    for tensor in state.values():
        if tensor.ndim == 2:
            tensor.add_(0.1 * tensor[:, :1] @ tensor[:1])
    save_state(thin, state)
    with StudiedFamily.open(base, {"thin": thin, "full": full}) as family:
        one, noise = records(low_rank.measure(family))
    # Qwen2 of width 48, four heads of 12, two of keys and values, MLP of 80.
    matrices = [(48, 48), (24, 48), (24, 48), (48, 48), (80, 48), (80, 48), (48, 80)]
    ratio = sum(o + i for o, i in matrices) / sum(o * i for o, i in matrices)
    assert one["ratio_mean"] == one["ratio_max"] == pytest.approx(ratio)
    assert one["blocks_below_1"] == 2
    assert one["rank"] == pytest.approx((5 / 48 + 2 / 24) / 7)
    assert isinstance(noise["ratio_min"], float)
    assert noise["ratio_min"] > 1  # noise has no low rank
    assert noise["blocks_below_1"] == 0


@pytest.mark.parametrize("tolerance", [0.0, 1.0, float("nan")])
def test_a_tolerance_that_asks_nothing_or_all_is_refused(
    family: StudiedFamily, tolerance: float
) -> None:
    with pytest.raises(InvalidRequestError, match="between 0 and 1"):
        low_rank.measure(family, tolerance=tolerance)


@pytest.mark.shared
def test_trained_deltas_are_as_large_as_their_blocks(mini: StudiedFamily) -> None:
    for row in records(low_rank.measure(mini)):
        assert isinstance(row["ratio_mean"], float)
        assert 0.9 < row["ratio_mean"] < 1.25
