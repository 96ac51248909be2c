from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from analysis.family import StudiedFamily
from analysis.probes import (
    amplification,
    generation_overlap,
    gradient_locality,
    interpolation,
    low_rank,
    mlp_permutation,
    regions,
)
from analysis.probes.devices import CPU, open_model
from analysis.probes.result import ProbeResult
from analysis.probes.sequences import Excerpt
from linker_core.errors import BadCheckpointError, InvalidRequestError
from tests.tiny import make_checkpoint, make_variant, save_state

EXCERPT = Excerpt(path=Path(__file__), num_sequences=2, num_tokens=8)


def test_a_model_is_opened_where_it_is_asked_for(family: StudiedFamily) -> None:
    assert open_model(family.base, CPU).device.type == "cpu"


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "", "meta"])
def test_a_device_that_is_not_there_is_refused(family: StudiedFamily, device: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be used here"):
        open_model(family.base, device)


def _interpolated(family: StudiedFamily) -> ProbeResult:
    return interpolation.measure(family, EXCERPT)


def _amplified(family: StudiedFamily) -> ProbeResult:
    return amplification.measure(family, EXCERPT)


@pytest.mark.parametrize("broken", ["base", "tuned"])
@pytest.mark.parametrize(
    "measure",
    [
        low_rank.measure,
        partial(mlp_permutation.measure, blocks="all"),
        regions.measure,
        _interpolated,
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, broken: str, measure: Callable[[StudiedFamily], ProbeResult]
) -> None:
    base = make_checkpoint(tmp_path / "base")
    tuned = make_variant(tmp_path / "tuned", base, scale=0.01)
    state = load_file(tmp_path / broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_state(tmp_path / broken, state)
    with (
        StudiedFamily.open(base, {"tuned": tuned}) as family,
        pytest.raises(BadCheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"),
    ):
        measure(family)


@pytest.mark.parametrize(
    ("broken", "measure"),
    [
        ("tuned", _interpolated),
        ("tuned", _amplified),
        ("tuned", partial(generation_overlap.measure, num_prompts=2, max_tokens=2)),
        ("base", gradient_locality.measure),
    ],
)
def test_a_model_whose_outputs_are_no_numbers_is_refused_by_name(
    tmp_path: Path, broken: str, measure: Callable[[StudiedFamily], ProbeResult]
) -> None:
    """Its weights are numbers, so nothing else would tell; its greedy answer would be token 0."""
    base = make_checkpoint(tmp_path / "base")
    tuned = make_variant(tmp_path / "tuned", base, scale=0.01)
    state = load_file(tmp_path / broken / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = torch.full_like(state[name], 3e38)
    save_state(tmp_path / broken, state)
    with (
        StudiedFamily.open(base, {"tuned": tuned}) as family,
        pytest.raises(InvalidRequestError, match=f"/{broken}: the model's outputs are no numbers"),
    ):
        measure(family)
