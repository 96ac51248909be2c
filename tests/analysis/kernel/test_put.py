"""Kernels on a model in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.gram import gram_pass
from analysis.kernel.apply import kernel_delta
from analysis.kernel.kernel import build_kernel
from analysis.kernel.put import put_kernel
from analysis.model import StudyModel
from analysis.selection import select
from analysis.tensors import read_tensor
from linker_core.errors import InvalidRequestError
from tests.analysis.planted import Planted


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_a_model_gets_base_plus_scaled_kernel(small_family: Planted, scale: float) -> None:
    with small_family.open() as family:
        grams = gram_pass(family, select(family.base, ["*.mlp.*"]))
        kernel = build_kernel(grams, names=family.names, seed=0)
        model = StudyModel.open(family.base)
        put_kernel(model, family, kernel, scale=7.0)  # what is there before does not count
        put_kernel(model, family, kernel, scale=scale)
        for name in model.names:
            expected = read_tensor(family.base, name).astype(np.float64)
            if name in kernel.tensors:
                expected += scale * kernel_delta(family, kernel, name)
            np.testing.assert_allclose(model.get(name), expected, rtol=1e-6, atol=1e-7)


def test_only_the_tensors_that_are_named_change(small_family: Planted) -> None:
    with small_family.open() as family:
        kernel = build_kernel(gram_pass(family, select(family.base)), names=family.names, seed=0)
        model = StudyModel.open(family.base)
        chosen, *others = kernel.tensors
        before = {name: model.get(name).clone() for name in others}
        put_kernel(model, family, kernel, scale=1.0, names=[chosen])
        assert all(torch.equal(model.get(name), before[name]) for name in others)
        changed = model.get(chosen).numpy() - read_tensor(family.base, chosen)
        assert np.linalg.norm(changed) == pytest.approx(kernel.tensors[chosen].norm, rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float32, "a smaller scale."), (torch.bfloat16, "or --dtype float32.")],
)
def test_sums_beyond_the_models_type_are_refused_with_the_tensor_and_the_remedy(
    small_family: Planted, dtype: torch.dtype, remedy: str
) -> None:
    with small_family.open() as family:
        kernel = build_kernel(gram_pass(family, select(family.base)), names=family.names, seed=0)
        model = StudyModel.open(family.base, dtype=dtype)
        with pytest.raises(InvalidRequestError) as refused:
            put_kernel(model, family, kernel, scale=1e42)
    assert refused.value.message.startswith(next(iter(kernel.tensors)))
    assert f"leaves the range of {str(dtype).removeprefix('torch.')}" in refused.value.message
    assert refused.value.message.endswith(remedy)
