"""Kernels' values, from the weights themselves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analysis.family import StudiedFamily
from analysis.kernel.apply import kernel_delta
from analysis.kernel.combination import Combination, CombinedTensor
from linker_core.errors import InvalidRequestError
from tests.tiny import make_checkpoint, save_state

NAME = "model.layers.0.mlp.up_proj.weight"
FAR = 2.0**127  # float32 ends below 2^128


@pytest.fixture
def far_apart(tmp_path: Path) -> Iterator[StudiedFamily]:
    """A fine-tune that is 2^128 away from its base in one tensor."""
    base = make_checkpoint(tmp_path / "base", layers=1)
    state = load_file(base / "model.safetensors")
    shutil.copytree(base, tmp_path / "far")
    for name, value in (("base", -FAR), ("far", FAR)):
        save_state(tmp_path / name, state | {NAME: torch.full_like(state[NAME], value)})
    with StudiedFamily.open(base, {"far": tmp_path / "far"}) as family:
        yield family


def _kernel(weight: float) -> Combination:
    part = CombinedTensor(weight=weight, coefficients=(1.0,), consensus_norm=0.0)
    return Combination(names=("far",), tensors={NAME: part})


def test_a_delta_beyond_float32_counts_whole_where_its_kernel_is_within(
    far_apart: StudiedFamily,
) -> None:
    assert np.all(kernel_delta(far_apart, _kernel(0.5), NAME) == FAR)


def test_a_kernel_beyond_float32_is_refused(far_apart: StudiedFamily) -> None:
    with pytest.raises(InvalidRequestError, match="range of float32"):
        kernel_delta(far_apart, _kernel(1.0), NAME)
