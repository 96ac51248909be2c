"""A small family with known deltas, open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.family import StudiedFamily
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture
def family(tmp_path: Path) -> Iterator[StudiedFamily]:
    """Variants `near` (every tensor moved by 1 % of its norm) and `far` (by 30 %)."""
    base = make_checkpoint(tmp_path / "base", dtype="float32", layers=3)
    near = make_variant(tmp_path / "near", base, scale=0.01, seed=1)
    far = make_variant(tmp_path / "far", base, scale=0.3, seed=2)
    with StudiedFamily.open(base, {"near": near, "far": far}) as opened:
        yield opened


@pytest.fixture
def mini(shared: Path) -> Iterator[StudiedFamily]:
    """The small trained family and its four fine-tunes."""
    folder = shared / "families" / "mini-qwen2"
    names = ("instruct", "chat", "math", "code")
    with StudiedFamily.open(folder / "base", {name: folder / name for name in names}) as opened:
        yield opened
