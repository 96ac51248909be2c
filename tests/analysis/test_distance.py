"""BS's numbers of a fine-tune, and the floor that rounding sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.distance import distance, rounding_floor
from analysis.study import study_tensor
from linker_core.sharing.report import Region
from tests.analysis.test_study import gram_of


@pytest.mark.parametrize(
    ("dtype", "stored", "within"),
    [("BF16", torch.bfloat16, 0.03), ("F16", torch.float16, 0.03)],
)
def test_rounding_floor_is_what_rounding_leaves(
    dtype: str, stored: torch.dtype, within: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Over whole binades, as the derivation has it, in the range where float16 is normal.
    weights = torch.exp2(-6 * torch.rand(200_000, generator=generator, dtype=torch.float64))
    error = weights.to(stored).double() - weights

    assert float(error.norm() / weights.norm()) == pytest.approx(
        rounding_floor([dtype]), rel=within
    )


def test_rounding_floor_of_normal_weights_is_near_that_of_even_ones() -> None:
    weights = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double() * 0.02
    error = weights.to(torch.bfloat16).double() - weights

    assert float(error.norm() / weights.norm()) == pytest.approx(rounding_floor(["BF16"]), rel=0.1)


def test_rounding_floor_is_of_the_coarsest_type() -> None:
    assert (
        rounding_floor(["F32", "BF16"])
        == rounding_floor(["BF16"])
        == pytest.approx(0.00153, rel=0.01)
    )
    assert rounding_floor(["F32"]) < 1e-7


def test_distance_means_over_blocks_as_bs_does() -> None:
    rng = np.random.default_rng(0)
    base_D = rng.standard_normal(512)
    names = [
        f"model.layers.{part}.weight"
        for part in ("0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.up_proj")
    ]
    studies = [
        study_tensor(
            gram_of(factor * base_D[None], base_D, name=name), names=("a",), seed=0, num_draws=19
        )
        for name, factor in zip(names, (0.1, 0.3, 0.6), strict=True)
    ]

    found = distance(studies, 0)

    assert found.cos == pytest.approx(1.0)
    assert found.epsilon == pytest.approx((0.2 + 0.6) / 2)
    assert found.region is Region.OUTSIDE
    assert found.floors == pytest.approx(0.6 / rounding_floor(["F32"]))
