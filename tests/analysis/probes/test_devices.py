from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from analysis.family import StudiedFamily
from analysis.probes import interpolation, low_rank, mlp_permutation, regions
from analysis.probes.devices import CPU, open_model
from analysis.probes.result import ProbeResult
from analysis.probes.sequences import Excerpt
from linker_core.errors import BadCheckpointError, InvalidRequestError
from tests.tiny import make_checkpoint, make_variant, save_state


def test_a_model_is_opened_where_it_is_asked_for(family: StudiedFamily) -> None:
    assert open_model(family.base, CPU).device.type == "cpu"


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "", "meta"])
def test_a_device_that_is_not_there_is_refused(family: StudiedFamily, device: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be used here"):
        open_model(family.base, device)


def _interpolated(family: StudiedFamily) -> ProbeResult:
    excerpt = Excerpt(path=Path(__file__), num_sequences=2, num_tokens=8)
    return interpolation.measure(family, excerpt)


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
