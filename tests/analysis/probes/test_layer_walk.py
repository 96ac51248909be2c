from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analysis.model import StudyModel
from analysis.probes.layer_walk import LayerWalk
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import ARCHITECTURES, make_checkpoint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_one_by_one_give_the_models_own_loss(tmp_path: Path, architecture: str) -> None:
    path = make_checkpoint(tmp_path / "m", architecture=architecture, layers=3)
    ids = torch.arange(20).view(1, 20) * 7 % 300
    with Checkpoint.open(path) as checkpoint:
        model = StudyModel.open(checkpoint)
        walk = LayerWalk(model, 20)
        hidden = walk.embed(ids)
        for layer in range(walk.num_layers):
            hidden = walk.layer(layer, hidden)
        assert walk.num_layers == 3
        assert walk.loss(hidden, ids) == pytest.approx(float(model.losses(ids).mean()), rel=1e-5)


def test_a_weight_that_is_put_later_is_the_one_that_runs(tmp_path: Path) -> None:
    with Checkpoint.open(make_checkpoint(tmp_path / "m")) as checkpoint:
        model = StudyModel.open(checkpoint)
        walk = LayerWalk(model, 4)
        hidden = walk.embed(torch.tensor([[1, 2, 3, 4]]))
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            full = f"model.layers.0.{name}.weight"
            model.put(full, torch.zeros_like(model.get(full)))
        torch.testing.assert_close(walk.layer(0, hidden), hidden)  # a block that adds nothing
