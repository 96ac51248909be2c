"""Directions of activations, and deltas without them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.model import StudyModel
from analysis.probes.ablation import Ablation, ablate
from analysis.probes.directions import difference_of_means, last_activations
from analysis.probes.refusal_direction import COLUMNS, measure
from analysis.selection import select
from analysis.tensors import read_tensor
from linker_core.errors import InvalidRequestError
from tests.analysis.planted import Planted

Floats = NDArray[np.float64]


def _units(seed: int, num: int, width: int) -> Floats:
    values = np.random.default_rng(seed).standard_normal((num, width))
    units: Floats = values / np.linalg.norm(values, axis=1, keepdims=True)
    return units


def _deltas(
    family: StudiedFamily, name: str, units_NH: Floats,
    *, base_too: bool,
) -> list[Floats]:  # fmt: skip
    """Deltas of ablated weights, built as they are."""
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    base = read_tensor(family.base, name).astype(np.float64)
    deltas = []
    for unit_H, checkpoint in zip(units_NH, family.variants.values(), strict=True):
        tuned = read_tensor(checkpoint, name).astype(np.float64)
        if not writes:
            deltas.append(tuned - base)
            continue
        ablated = tuned - np.outer(unit_H, unit_H @ tuned)
        before = base - np.outer(unit_H, unit_H @ base) if base_too else base
        deltas.append(ablated - before)
    return deltas


def _mean_cosines(
    family: StudiedFamily, units_NH: Floats,
    *, base_too: bool,
) -> Floats:  # fmt: skip
    total = np.zeros((len(units_NH), len(units_NH)))
    names = select(family.base)
    for name in names:
        flat_ND = np.stack([d.ravel() for d in _deltas(family, name, units_NH, base_too=base_too)])
        flat_ND /= np.linalg.norm(flat_ND, axis=1, keepdims=True)
        total += flat_ND @ flat_ND.T
    return total / len(names)


@pytest.fixture(scope="module")
def units() -> tuple[Floats, ...]:
    return _units(1, 5, 48), _units(2, 5, 48)


def test_cosines_without_directions_are_those_of_ablated_weights(
    small_family: Planted, units: tuple[Floats, ...]
) -> None:
    own_NH, random_NH = units
    with small_family.open() as family:
        found = ablate(family, own_NH, random_NH)
        expected = Ablation(
            _mean_cosines(family, np.zeros_like(own_NH), base_too=False),
            _mean_cosines(family, own_NH, base_too=True),
            _mean_cosines(family, random_NH, base_too=True),
            _mean_cosines(family, own_NH, base_too=False),
            _mean_cosines(family, random_NH, base_too=False),
            found.along_N,
        )
    for got, form in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, form, rtol=0, atol=1e-9)
    assert np.abs(found.weights_NN - found.cos_NN).max() > 1e-3  # or the comparison says little


def test_deltas_along_a_direction_are_seen_there(small_family: Planted) -> None:
    """Of random deltas 1/H lies along any direction: along is about 1."""
    with small_family.open() as family:
        along_N = ablate(family, _units(3, 5, 48), _units(4, 5, 48)).along_N
        name = "model.layers.0.self_attn.o_proj.weight"
        delta = read_tensor(family.variants["one"], name) - read_tensor(family.base, name)
        left = np.linalg.svd(delta.astype(np.float64))[0][:, 0]
        towards = ablate(family, np.stack([left] * 5), _units(4, 5, 48)).along_N
    np.testing.assert_allclose(along_N, 1, atol=0.35)
    assert towards[0] > along_N[0]


def test_directions_lead_from_the_second_sets_mean_to_the_first() -> None:
    rng = np.random.default_rng(0)
    other = rng.standard_normal((40, 5, 6))
    one = rng.standard_normal((30, 5, 6))
    one[:, 2, 3] += 20.0  # far apart at layer 2, along axis 3
    one[:, 4, 1] += 900.0  # beyond the first 80 % of the layers
    found = difference_of_means(one, other)
    assert found.layer == 2
    assert found.unit_H[3] == pytest.approx(1, abs=0.01)
    expected = one[:, 2].mean(axis=0) - other[:, 2].mean(axis=0)
    np.testing.assert_allclose(found.unit_H, expected / np.linalg.norm(expected))
    assert found.separation == pytest.approx(20, rel=0.2)
    assert difference_of_means(one, other, layer=4).unit_H[1] == pytest.approx(1, abs=0.01)


def test_sets_that_do_not_differ_and_layers_that_are_not_there_are_refused() -> None:
    same = np.ones((3, 4, 6))
    with pytest.raises(InvalidRequestError, match="same mean"):
        difference_of_means(same, same)
    with pytest.raises(InvalidRequestError, match="--layer"):
        difference_of_means(same, same, layer=4)


def test_activations_are_the_residual_stream_at_the_last_token(small_family: Planted) -> None:
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    with small_family.open() as family:
        model = StudyModel.open(family.base)
        found_PLH = last_activations(model, prompts)
        body = model.module.get_submodule("model")
        seen: list[torch.Tensor] = []
        # What the second layer reads is what the first wrote.
        hook = body.get_submodule("layers.1").register_forward_pre_hook(
            lambda _module, given: seen.append(given[0][0, -1])
        )
        for ids in prompts:
            model.hidden(torch.tensor([ids]))
        hook.remove()
    assert found_PLH.shape == (2, 1, 48)  # two layers, the last of which is behind the norm
    np.testing.assert_allclose(found_PLH[:, 0], torch.stack(seen).double().numpy(), rtol=1e-6)


def test_the_probe_compares_every_pair(small_family: Planted, tmp_path: Path) -> None:
    for name in ("refused", "answered"):
        prompts = "\n".join(json.dumps(f"{name} number {n}") for n in range(6))
        (tmp_path / name).write_text(prompts)
    with small_family.open() as family:
        result = measure(family, tmp_path / "refused", tmp_path / "answered", num_prompts=5)
        again = measure(family, tmp_path / "refused", tmp_path / "answered", num_prompts=5)
    assert result == again
    assert len(result.rows) == 10
    by_column = dict(zip(COLUMNS, zip(*result.rows, strict=True), strict=True))
    assert result.facts["largest weights_change"] == pytest.approx(
        max(abs(float(change or 0)) for change in by_column["weights_change"])
    )
    assert result.facts["one: layer"] == 0


def test_too_few_variants_or_prompts_are_refused(small_family: Planted, tmp_path: Path) -> None:
    (tmp_path / "two").write_text('"a"\n"b"\n')
    (tmp_path / "one").write_text('"a"\n')
    alone = {"one": small_family.variants["one"]}
    with (
        StudiedFamily.open(small_family.base, alone) as family,
        pytest.raises(InvalidRequestError, match="two fine-tunes"),
    ):
        measure(family, tmp_path / "two", tmp_path / "two")
    with small_family.open() as family, pytest.raises(InvalidRequestError, match="two prompts"):
        measure(family, tmp_path / "two", tmp_path / "one")
