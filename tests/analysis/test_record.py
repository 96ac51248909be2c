"""What a record keeps of symmetric matrices, and what follows from it."""

from __future__ import annotations

import json

import numpy as np

from analysis.null import cosine_null95
from analysis.pca import cosines
from analysis.record import TensorStudy
from analysis.study import study_tensor
from tests.analysis.planted import NAMES
from tests.analysis.test_study import gram_of


def test_matrices_are_whole_again_after_json_to_the_bit() -> None:
    rng = np.random.default_rng(5)
    gram = gram_of(rng.standard_normal((6, 2048)), rng.standard_normal(2048), runs=16)
    made = study_tensor(gram, names=NAMES[:6], seed=0, num_draws=9)
    study = TensorStudy.from_json(json.loads(json.dumps(made.to_json())))
    assert study == made
    below = np.tril_indices(6)
    assert np.array_equal(study.whole_gram[below], gram.gram_NN[below])
    assert np.array_equal(study.whole_gram, study.whole_gram.T)
    assert np.array_equal(study.cosines, cosines(study.whole_gram))
    assert np.array_equal(study.whole_null95[below], cosine_null95(gram.groups_CNN)[below])
    assert np.array_equal(study.whole_null95, study.whole_null95.T)


def test_record_keeps_each_pair_once() -> None:
    rng = np.random.default_rng(6)
    gram = gram_of(rng.standard_normal((6, 2048)), rng.standard_normal(2048), runs=16)
    record = study_tensor(gram, names=NAMES[:6], seed=0, num_draws=9).to_json()
    triangle = [1, 2, 3, 4, 5, 6]
    assert [len(row) for row in record["gram"]] == triangle
    assert [len(row) for row in record["cosines_null95"]] == triangle
    assert "cosines" not in record
