"""A few rows of every matrix tell a fine-tune from a stranger, in any float type."""

from __future__ import annotations

from pathlib import Path

import pytest

from linker_core.errors import BadCheckpointError
from linker_core.sharing.closeness import measure_closeness
from linker_core.sharing.report import Region
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant, retyped

BIG = {"hidden": 64, "intermediate": 640, "layers": 3}


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "donor", **BIG)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(0.02, Region.ALIGNED), (0.2, Region.BOUNDARY), (0.5, Region.OUTSIDE)],
)
def test_sample_estimates_what_the_whole_scan_finds(
    tmp_path: Path, donor: Path, scale: float, expected: Region
) -> None:
    variant = make_variant(tmp_path / "v", donor, scale=scale)
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        found, truth = measure_closeness(a, b), scan(a, b)
    assert found.mean_cos == pytest.approx(truth.mean_cos, abs=0.1 * scale**2)
    assert found.mean_epsilon == pytest.approx(truth.mean_epsilon, rel=0.05)
    assert found.region is truth.region is expected


def test_stranger_of_the_same_shape_is_outside(tmp_path: Path, donor: Path) -> None:
    stranger = make_checkpoint(tmp_path / "s", seed=9, **BIG)  # type: ignore[arg-type]
    with Checkpoint.open(donor) as a, Checkpoint.open(stranger) as b:
        found = measure_closeness(a, b)
    assert found.region is Region.OUTSIDE
    assert found.mean_epsilon > 1


def test_sample_is_the_same_every_time_and_a_small_part_of_the_model(
    tmp_path: Path, donor: Path
) -> None:
    variant = make_variant(tmp_path / "v", donor, scale=0.02)
    read: list[int] = []
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        found = [
            measure_closeness(a, b, progress=lambda _, total: read.append(total)) for _ in range(2)
        ]
        whole = scan(a, b).bytes_read
    assert found[0] == found[1]
    assert max(read) < 0.4 * whole


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_float_type_is_compared_by_value(tmp_path: Path, donor: Path, dtype: str) -> None:
    variant = make_variant(tmp_path / "v", donor, scale=0.02)
    other = retyped(tmp_path / "other", variant, dtype)
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b, Checkpoint.open(other) as c:
        assert measure_closeness(a, c).mean_epsilon == pytest.approx(
            measure_closeness(a, b).mean_epsilon, rel=1e-3
        )
        assert measure_closeness(c, a).region is Region.ALIGNED


def test_other_signatures_are_refused(tmp_path: Path, donor: Path) -> None:
    other = make_checkpoint(tmp_path / "other")
    with (
        Checkpoint.open(donor) as a,
        Checkpoint.open(other) as b,
        pytest.raises(BadCheckpointError, match="hidden_size: donor 64, variant 48"),
    ):
        measure_closeness(a, b)


def test_added_tokens_make_no_difference(tmp_path: Path, donor: Path) -> None:
    plain = make_variant(tmp_path / "v", donor, scale=0.02)
    wide = make_variant(tmp_path / "w", donor, scale=0.02, added_tokens=("<|tool|>",))
    with Checkpoint.open(donor) as a, Checkpoint.open(plain) as b, Checkpoint.open(wide) as c:
        assert measure_closeness(a, c) == measure_closeness(a, b)
