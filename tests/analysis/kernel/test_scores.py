"""FM Eq. 3's factors against the same computed from the deltas themselves."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.kernel.scores import coherence
from analysis.pca import MAX_SNR


def _deltas(num: int, seed: int = 0) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal(500)
    own = generator.standard_normal((num, 500))
    sizes = generator.uniform(0.5, 2, (num, 1))
    return np.asarray(sizes * (0.6 * shared + own))


@pytest.mark.parametrize("num", [3, 5, 8])
@pytest.mark.parametrize("centred", [True, False])
def test_coherence_is_that_of_the_deltas(num: int, centred: bool) -> None:
    deltas = _deltas(num, seed=num)
    found = coherence(deltas @ deltas.T, centred=centred)

    mean = deltas.mean(axis=0)
    values = np.linalg.svd(deltas - mean if centred else deltas, compute_uv=False) ** 2
    assert found.pc1 == pytest.approx(values[0] / values.sum(), rel=1e-9)
    assert found.centred is centred
    unit = deltas / np.linalg.norm(deltas, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(num) for j in range(i)]
    assert found.cos_mean == pytest.approx(np.mean(pairs), rel=1e-9)
    noise = np.sqrt(np.mean(np.sum((deltas - mean) ** 2, axis=1)))
    assert found.snr == pytest.approx(np.linalg.norm(mean) / noise, rel=1e-9)
    assert found.score == pytest.approx(found.pc1 * found.cos_mean * found.snr)


def test_two_fine_tunes_are_scored_uncentred_and_it_is_said() -> None:
    deltas = _deltas(2)
    gram = deltas @ deltas.T
    found = coherence(gram, centred=True)
    assert not found.centred
    assert found.pc1 == pytest.approx(np.linalg.eigvalsh(gram)[-1] / np.trace(gram))


def test_deltas_of_zero_have_nothing_in_common() -> None:
    found = coherence(np.zeros((4, 4)))
    assert (found.pc1, found.cos_mean, found.snr, found.score) == (0, 0, 0, 0)


def test_a_delta_of_zero_counts_as_a_pair_that_agrees_in_nothing() -> None:
    deltas = _deltas(3)
    deltas[1] = 0
    cosine = deltas[0] @ deltas[2] / np.linalg.norm(deltas[0]) / np.linalg.norm(deltas[2])
    assert coherence(deltas @ deltas.T).cos_mean == pytest.approx(cosine / 3)


def test_equal_deltas_have_the_largest_snr_that_is_told_apart() -> None:
    deltas = np.tile(_deltas(1), (4, 1))
    for centred in (True, False):
        found = coherence(deltas @ deltas.T, centred=centred)
        assert found.snr == MAX_SNR
        assert found.score == pytest.approx(MAX_SNR)


def test_deltas_that_cancel_out_have_no_signal() -> None:
    delta = _deltas(1)
    deltas = np.concatenate([delta, -delta])
    found = coherence(deltas @ deltas.T)
    assert found.snr == pytest.approx(0, abs=1e-7)
    assert found.cos_mean == pytest.approx(-1)
