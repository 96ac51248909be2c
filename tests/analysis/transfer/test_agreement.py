"""Agreement of planted sides: unrelated ones are at chance, opposed ones are flipped."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.transfer.agreement import agreements
from analysis.transfer.side import Side

NAMES = tuple(
    f"model.layers.{layer}.{part}.weight"
    for layer in range(40)
    for part in ("self_attn.q_proj", "mlp.up_proj")
)


def planted(seed: int, size: float = 1.0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {name: (size * rng.standard_normal((20, 30))).astype(np.float32) for name in NAMES}


def side(deltas: dict[str, NDArray[np.float32]]) -> Side:
    return Side(kernel_of=deltas.__getitem__, mean_of=deltas.__getitem__)


def test_agreements_of_unrelated_families_are_at_chance() -> None:
    found = agreements(side(planted(1)), side(planted(2, size=4.0)), NAMES)
    assert list(found) == ["q", "up", "all"]
    assert (found["q"].num_tensors, found["all"].num_tensors) == (40, 80)
    assert found["all"].chance_rms == pytest.approx(1 / 600**0.5)
    assert found["all"].cos_rms == pytest.approx(found["all"].chance_rms, rel=0.3)
    assert 20 < found["all"].num_flipped < 60
    assert found["all"].norm_ratio == pytest.approx(0.25, rel=0.05)


def test_agreements_of_an_opposed_component_say_which() -> None:
    own = planted(1)
    other = {name: -values if "q_proj" in name else values for name, values in own.items()}
    found = agreements(side(own), side(other), NAMES)
    assert (found["q"].num_flipped, found["up"].num_flipped) == (40, 0)
    assert found["q"].cos_mean == pytest.approx(-1)
    assert found["up"].cos_mean == pytest.approx(1)
    assert found["all"].cos_mean == pytest.approx(0, abs=1e-6)
    assert found["all"].cos_rms == pytest.approx(1)
