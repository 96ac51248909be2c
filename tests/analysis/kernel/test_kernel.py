"""A kernel's record against the deltas that it is of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from analysis.gram import gram_pass
from analysis.kernel.apply import kernel_delta
from analysis.kernel.consensus import Strategy
from analysis.kernel.kernel import Kernel, Weighting, build_kernel
from analysis.kernel.metropolis import posterior_mean
from analysis.kernel.robust import GeometricMedian
from analysis.selection import select
from analysis.tensors import read_tensor
from linker_core.errors import InvalidRequestError
from tests.analysis.planted import Planted


@pytest.fixture(scope="module")
def kernel(small_family: Planted) -> Kernel:
    return _build(small_family)


def _build(
    planted: Planted, *, strategy: Strategy | None = None, whole_model: bool = False
) -> Kernel:
    with planted.open() as family:
        grams = gram_pass(family, select(family.base))
        return build_kernel(
            grams,
            names=family.names,
            seed=1,
            temperature=0.05,
            strategy=strategy,
            whole_model=whole_model,
        )


def test_weights_are_those_of_the_scores(kernel: Kernel) -> None:
    scores = np.array([tensor.coherence.score for tensor in kernel.tensors.values()])
    weights = [tensor.weight for tensor in kernel.tensors.values()]
    np.testing.assert_allclose(weights, posterior_mean(scores / 0.05), atol=0.02)
    # Five deltas, half along one direction: PC1 uncentred is 0.6; cosines are a half.
    for tensor in kernel.tensors.values():
        assert tensor.coherence.cos_mean == pytest.approx(0.5, abs=1e-4)
        assert tensor.coherence.snr == pytest.approx((0.6 / 0.4) ** 0.5, abs=1e-3)
        assert tensor.coherence.pc1 == pytest.approx(0.25, abs=1e-3)  # centred: four equal axes


def test_norms_are_those_of_the_values(small_family: Planted, kernel: Kernel) -> None:
    with small_family.open() as family:
        for name, tensor in kernel.tensors.items():
            found = np.linalg.norm(kernel_delta(family, kernel, name).astype(np.float64))
            assert found == pytest.approx(tensor.norm, rel=1e-6)


def test_delta_is_the_weighted_mean_of_the_deltas(small_family: Planted, kernel: Kernel) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with small_family.open() as family:
        base = read_tensor(family.base, name).astype(np.float64)
        deltas = [read_tensor(one, name) - base for one in family.variants.values()]
        found = kernel_delta(family, kernel, name)
    assert found.dtype == np.float32
    expected = kernel.tensors[name].weight * np.mean(deltas, axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_uniform_has_one_weight_and_the_same_norm(kernel: Kernel) -> None:
    uniform = kernel.uniform()
    weights = {tensor.weight for tensor in uniform.tensors.values()}
    assert len(weights) == 1
    assert uniform.norm == pytest.approx(kernel.norm)
    assert uniform.weighting is Weighting.UNIFORM
    norms = np.array([tensor.norm for tensor in kernel.tensors.values()])
    assert kernel.norm == pytest.approx(np.linalg.norm(norms))


def test_cosine_to_uniform_is_that_of_the_values(small_family: Planted, kernel: Kernel) -> None:
    uniform = kernel.uniform()
    with small_family.open() as family:
        values, others = (
            np.concatenate([kernel_delta(family, one, name).ravel() for name in one.tensors])
            for one in (kernel, uniform)
        )
    cosine = values @ others / np.linalg.norm(values) / np.linalg.norm(others)
    assert kernel.cosine_to_uniform == pytest.approx(float(cosine), abs=1e-5)
    assert uniform.cosine_to_uniform == pytest.approx(1)


def test_raw_mean_is_the_mean_whatever_the_strategy(small_family: Planted) -> None:
    robust = _build(small_family, strategy=GeometricMedian())
    raw = robust.raw_mean()
    assert raw.weighting is Weighting.RAW_MEAN
    assert raw.strategy == "mean"
    for name, tensor in raw.tensors.items():
        assert tensor.weight == 1
        assert tensor.coefficients == pytest.approx((0.2,) * 5)
        gram = small_family.grams_NN[name]
        assert tensor.norm == pytest.approx(float(gram.mean()) ** 0.5, rel=1e-4)


def test_whole_model_has_one_set_of_coefficients(small_family: Planted) -> None:
    each = _build(small_family, strategy=GeometricMedian())
    whole = _build(small_family, strategy=GeometricMedian(), whole_model=True)
    assert len({tensor.coefficients for tensor in whole.tensors.values()}) == 1
    assert len({tensor.coefficients for tensor in each.tensors.values()}) > 1
    joined = np.sum(list(small_family.grams_NN.values()), axis=0)
    first = next(iter(whole.tensors.values()))
    expected = GeometricMedian().coefficients(joined)
    np.testing.assert_allclose(first.coefficients, expected, atol=1e-4)


def test_weights_per_layer_are_means_of_the_layers_tensors(kernel: Kernel) -> None:
    found = kernel.weights_per_layer()
    assert list(found) == [0, 1]
    first = [t.weight for name, t in kernel.tensors.items() if name.startswith("model.layers.0.")]
    assert len(first) == 7
    assert found[0] == pytest.approx(np.mean(first))


def test_snr_is_of_all_tensors_together(small_family: Planted, kernel: Kernel) -> None:
    joined = np.sum(list(small_family.grams_NN.values()), axis=0)
    signal = joined.mean()
    noise = np.trace(joined) / 5 - signal
    assert kernel.snr == pytest.approx((signal / noise) ** 0.5, rel=1e-4)


def test_record_is_json_and_says_all_that_was_chosen(kernel: Kernel) -> None:
    record = json.loads(json.dumps(kernel.to_json()))
    assert record["fine_tunes"] == list(kernel.names)
    assert record["temperature"] == 0.05
    assert (record["num_steps"], record["burn_in"], record["seed"]) == (5000, 1000, 1)
    assert record["acceptance_ratio"] == pytest.approx(kernel.acceptance_ratio)
    assert record["tensors"].keys() == kernel.tensors.keys()


def test_one_fine_tune_has_no_kernel() -> None:
    with pytest.raises(InvalidRequestError, match="at least two"):
        build_kernel([], names=("one",), seed=0)
