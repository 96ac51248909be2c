"""KL to the base, against distributions computed the plain way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from analysis import behaviour
from analysis.behaviour import kl_to_base
from analysis.family import StudiedFamily
from analysis.model import StudyModel
from linker_core.weights.checkpoint import Checkpoint
from tests.analysis.planted import Structure, plant_family
from tests.tiny import make_checkpoint

IDS = [3, 7, 1, 9, 4, 4, 8, 2, 6, 5, 11]


def test_kl_to_base_is_that_of_the_next_token_distributions(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=2, scales={"one": 0.0}, scale=0.3))

    with planted.open() as family:
        found = kl_to_base(family, IDS)
        logs = []
        for checkpoint in (family.base, family.variants["two"]):
            model = StudyModel.open(checkpoint)
            with torch.no_grad():
                logits_nV = model.module(torch.tensor([IDS])).logits[0]
            logs.append(torch.log_softmax(logits_nV.double(), dim=-1))

    base_nV, two_nV = logs
    expected = float((two_nV.exp() * (two_nV - base_nV)).sum(dim=-1).mean())
    assert found == {"one": 0.0, "two": pytest.approx(expected, rel=1e-4)}
    assert expected > 1e-4


def test_kl_to_base_over_several_windows_counts_every_token_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=1, scale=0.3))

    with planted.open() as family:
        parts = [kl_to_base(family, IDS[:4])["one"], kl_to_base(family, IDS[4:8])["one"]]
        last = kl_to_base(family, IDS[8:])["one"]
        monkeypatch.setattr(behaviour, "WINDOW", 4)
        whole = kl_to_base(family, IDS)["one"]

    assert whole == pytest.approx((4 * parts[0] + 4 * parts[1] + 3 * last) / 11, rel=1e-5)


def test_kl_to_base_with_added_tokens_is_over_the_shared_ones(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32")
    more = make_checkpoint(tmp_path / "more", dtype="float32", seed=1, added_tokens=("<a>", "<b>"))

    with StudiedFamily.open(base, {"more": more}) as family:
        found = kl_to_base(family, IDS)["more"]
        logs = []
        for checkpoint in family.checkpoints:
            model = StudyModel.open(checkpoint)
            with torch.no_grad():
                logits_nV = model.logits(model.hidden(torch.tensor([IDS]))[0])[:, :512]
            logs.append(torch.log_softmax(logits_nV.double(), dim=-1))

    base_nV, more_nV = logs
    assert found == pytest.approx(
        float((more_nV.exp() * (more_nV - base_nV)).sum(dim=-1).mean()), rel=1e-4
    )


def test_kl_of_a_model_that_diverged_is_infinite(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=1, scale=0.3))

    with planted.open() as family:
        (name,) = family.names
        opened = StudyModel.open

        def diverged(checkpoint: Checkpoint, *, device: str) -> StudyModel:
            model = opened(checkpoint, device=device)
            if checkpoint is family.variants[name]:
                norm = model.get("model.norm.weight")
                model.put("model.norm.weight", torch.full_like(norm, torch.nan))
            return model

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StudyModel, "open", diverged)
            assert kl_to_base(family, IDS) == {name: math.inf}
