"""FM's conditions on planted families: what each adds to which base, seen in the weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from analysis.model import StudyModel
from analysis.transfer.conditions import (
    BEYOND_FM,
    FM_CONDITIONS,
    Condition,
    Form,
    Part,
    delta_of,
    matching_tensors,
    measure_conditions,
)
from analysis.transfer.side import Side
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
NAMES = (Q, UP)
SHAPES = {Q: (48, 48), UP: (80, 48)}


def random_deltas(seed: int, size: float) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        name: (size * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def side(kernel: dict[str, NDArray[np.float32]], mean: dict[str, NDArray[np.float32]]) -> Side:
    return Side(kernel_of=kernel.__getitem__, mean_of=mean.__getitem__)


OWN_KERNEL, OWN_MEAN = random_deltas(1, 0.1), random_deltas(2, 0.2)
OTHER_KERNEL, OTHER_MEAN = random_deltas(3, 0.5), random_deltas(4, 1.0)
CONTROLS = [c for c in BEYOND_FM if c.form not in (Form.RAW, Form.ALIGNED)]
OWN, OTHER = side(OWN_KERNEL, OWN_MEAN), side(OTHER_KERNEL, OTHER_MEAN)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[StudyModel]:
    with Checkpoint.open(make_checkpoint(tmp_path / "model", dtype="float32")) as checkpoint:
        yield StudyModel.open(checkpoint)


def test_conditions_are_those_of_table_5() -> None:
    titles = {c.key: c.title(target="Llama", source="Mistral") for c in FM_CONDITIONS}
    assert titles == {
        "C0": "Llama base",
        "C1": "Llama self-kernel",
        "C2": "Mistral → Llama",
        "C3": "Mistral → Llama (attention)",
        "C4": "Mistral → Llama (mlp)",
        "C5": "Mistral → Llama (sign-norm)",
        "C6": "Mistral base",
        "C7": "Llama → Mistral",
    }


def test_measure_conditions_adds_what_each_says_and_gives_the_base_back(
    model: StudyModel,
) -> None:
    base = {name: model.get(name).clone() for name in model.names}

    def added(changed: StudyModel) -> dict[str, NDArray[np.float32]]:
        return {
            name: (changed.get(name) - values).numpy()
            for name, values in base.items()
            if not torch.equal(changed.get(name), values)
        }

    on_target = [condition for condition in FM_CONDITIONS if condition.on_target]
    outcomes = dict(
        measure_conditions(on_target, model, added, own=OWN, other=OTHER, names=NAMES, alpha=0.5)
    )
    found = {key: outcome.measured for key, outcome in outcomes.items()}
    assert {key: set(deltas) for key, deltas in found.items()} == {
        "C0": set(), "C1": {Q, UP}, "C2": {Q, UP}, "C3": {Q}, "C4": {UP}, "C5": {Q, UP},
    }  # fmt: skip
    for key, name, kernel in (
        ("C1", Q, OWN_KERNEL), ("C2", Q, OTHER_KERNEL), ("C3", Q, OTHER_KERNEL),
        ("C4", UP, OTHER_KERNEL),
    ):  # fmt: skip
        np.testing.assert_allclose(found[key][name], kernel[name] / 2, atol=1e-6)
    assert outcomes["C0"].norm == 0
    assert outcomes["C4"].norm == pytest.approx(np.linalg.norm(OTHER_KERNEL[UP]) / 2, rel=1e-5)
    assert all(torch.equal(model.get(name), values) for name, values in base.items())


def test_aligned_condition_has_the_targets_sign_and_norm() -> None:
    for name in NAMES:
        put = delta_of(Condition(key="", crossed=True, form=Form.ALIGNED), own=OWN, other=OTHER)
        delta, mean = put(name), OWN_MEAN[name]
        assert np.linalg.norm(delta) == pytest.approx(np.linalg.norm(mean), rel=1e-5)
        assert np.vdot(delta, mean) > 0
        cos = np.vdot(delta, OTHER_KERNEL[name])
        cos /= np.linalg.norm(delta) * np.linalg.norm(OTHER_KERNEL[name])
        assert abs(cos) == pytest.approx(1, rel=1e-5)


def test_aligned_parts_are_parts_of_the_aligned_kernel(model: StudyModel) -> None:
    aligned = [condition for condition in BEYOND_FM if condition.form is Form.ALIGNED]
    outcomes = dict(
        measure_conditions(
            [*aligned, FM_CONDITIONS[5]], model, lambda _: None, own=OWN, other=OTHER, names=NAMES
        )
    )
    assert outcomes["A3"].norm == pytest.approx(np.linalg.norm(OWN_MEAN[Q]), rel=1e-5)
    assert outcomes["A4"].norm == pytest.approx(np.linalg.norm(OWN_MEAN[UP]), rel=1e-5)
    both = outcomes["A3"].norm ** 2 + outcomes["A4"].norm ** 2
    assert outcomes["C5"].norm ** 2 == pytest.approx(both)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.key)
def test_controls_have_the_size_and_not_the_direction(control: Condition) -> None:
    sized_as = {"N1": OWN_KERNEL, "N2": OTHER_KERNEL, "S2": OTHER_KERNEL, "N5": OWN_MEAN}[
        control.key
    ]
    put = delta_of(control, own=OWN, other=OTHER, seed=5)
    again = delta_of(control, own=OWN, other=OTHER, seed=5)
    for name in NAMES:
        noise = put(name)
        norm = np.linalg.norm(sized_as[name])
        assert np.linalg.norm(noise) == pytest.approx(norm, rel=1e-5)
        for kernel in (OWN_KERNEL, OTHER_KERNEL, OWN_MEAN):
            cos = np.vdot(noise, kernel[name]) / (norm * np.linalg.norm(kernel[name]))
            assert abs(cos) < 5 / np.sqrt(noise.size)
        np.testing.assert_array_equal(again(name), noise)


def test_noises_of_one_seed_are_independent_draws() -> None:
    noises = [
        delta_of(control, own=OWN, other=OTHER, seed=5)(Q)
        for control in CONTROLS
        if control.form is not Form.SHUFFLED
    ]
    assert len(noises) == 3
    for a, b in itertools.combinations(noises, 2):
        cos = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
        assert abs(cos) < 5 / np.sqrt(a.size)


def test_part_of_a_norm_is_neither_attention_nor_mlp() -> None:
    norm = "model.layers.0.input_layernorm.weight"
    assert [part.holds(norm) for part in Part] == [True, False, False]
    assert [part.holds(Q) for part in Part] == [True, True, False]
    assert [part.holds(UP) for part in Part] == [True, False, True]


def test_matching_tensors_of_another_mlp_are_the_attentions(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path / "target")
    source = make_checkpoint(tmp_path / "source", architecture="llama", intermediate=96)
    with Checkpoint.open(target) as one, Checkpoint.open(source) as other:
        assert matching_tensors(one, other, NAMES) == (Q,)
        with pytest.raises(InvalidRequestError, match="source has none of target's 1 tensors"):
            matching_tensors(one, other, (UP,))
