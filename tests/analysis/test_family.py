"""Opening a family: what is accepted, and whom an error names."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.family import StudiedFamily
from linker_core.errors import BadCheckpointError, InvalidRequestError
from tests.analysis.planted import Planted
from tests.tiny import make_checkpoint


def test_open_family_keeps_the_order_of_its_fine_tunes(small_family: Planted) -> None:
    backwards = dict(reversed(small_family.variants.items()))
    with StudiedFamily.open(small_family.base, backwards) as family:
        assert family.names == tuple(backwards)
        assert [c.path for c in family.checkpoints] == [small_family.base, *backwards.values()]


def test_open_without_fine_tunes_is_refused(small_family: Planted) -> None:
    with pytest.raises(InvalidRequestError, match="at least one fine-tune"):
        StudiedFamily.open(small_family.base, {})


def test_open_with_a_model_of_another_shape_names_its_folder(
    small_family: Planted, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", layers=1)
    with pytest.raises(BadCheckpointError, match="other: The variant is no fine-tune"):
        StudiedFamily.open(small_family.base, small_family.variants | {"other": other})


def test_open_that_fails_leaves_no_file_open(small_family: Planted, tmp_path: Path) -> None:
    before = _num_open_files()
    with pytest.raises(BadCheckpointError, match="nowhere"):
        StudiedFamily.open(small_family.base, small_family.variants | {"n": tmp_path / "nowhere"})
    assert _num_open_files() == before


def _num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
