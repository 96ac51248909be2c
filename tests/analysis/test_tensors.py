"""Values of stored tensors, of every type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from analysis.tensors import read_runs, read_tensor
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, retyped

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_read_tensor_is_exact_for_every_type(tmp_path: Path, dtype: str) -> None:
    made = make_checkpoint(tmp_path / "made", dtype="float32")
    path = retyped(tmp_path / "model", made, dtype)
    stored = load_file(path / "model.safetensors")
    with Checkpoint.open(path) as checkpoint:
        for name, tensor in stored.items():
            values = read_tensor(checkpoint, name)
            assert values.dtype == np.float32
            assert np.array_equal(values, tensor.float().numpy())


def test_read_runs_cover_the_tensor_in_order(tmp_path: Path) -> None:
    with Checkpoint.open(make_checkpoint(tmp_path / "model")) as checkpoint:
        runs = list(read_runs(checkpoint, NAME, run_elements=1000))
        assert [run.size for run in runs] == [1000, 1000, 1000, 840]
        assert np.array_equal(np.concatenate(runs), read_tensor(checkpoint, NAME).ravel())
        runs[0][:] = 0  # each run is the caller's own
