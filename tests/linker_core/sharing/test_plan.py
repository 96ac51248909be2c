from __future__ import annotations

import json
from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError
from linker_core.sharing.plan import Fingerprints, Policy, Rung, SharePlan, plan_donor, plan_variant
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def planned(
    donor: Path,
    variant: Path,
    policy: Policy = Policy.THRESHOLDS,
    *,
    tau_cos: float | None = None,
    tau_frob: float | None = None,
) -> SharePlan:
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        return plan_variant(
            scan(a, b),
            a,
            b,
            policy=policy,
            fingerprints=Fingerprints("donor", "variant"),
            tau_cos=tau_cos,
            tau_frob=tau_frob,
        )


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "donor", tie=False)


def test_thresholds_alias_whole_blocks_norms_included_and_nothing_outside(
    tmp_path: Path, donor: Path
) -> None:
    variant = make_variant(tmp_path / "v", donor, scale={UP: 0.9, NORM: 0.01})
    plan = planned(donor, variant, tau_cos=0.99, tau_frob=0.05)
    aliased = {name for name, rung in plan.rungs.items() if rung is Rung.ALIAS}
    assert aliased == {name for name in plan.rungs if name.startswith("model.layers.0.")}
    assert plan.blocks.to_json() == {"alias": 1, "residual": 0, "own": 1, "total": 2}


def test_plan_bytes_are_sums_over_tensors(tmp_path: Path, donor: Path) -> None:
    variant = make_variant(tmp_path / "v", donor, scale={UP: 0.9})
    plan = planned(donor, variant, tau_cos=0.99, tau_frob=0.05)
    with Checkpoint.open(variant) as checkpoint:
        own = sum(t.nbytes for n, t in checkpoint.tensors.items() if "layers.0." not in n)
        assert plan.unique_bytes == own
        assert plan.logical_bytes == plan.checkpoint_bytes == checkpoint.nbytes
        assert plan.shared_bytes == checkpoint.nbytes - own


def test_exact_aliases_only_equal_bytes_wherever_they_are(tmp_path: Path, donor: Path) -> None:
    variant = make_variant(tmp_path / "v", donor, scale={UP: 1e-2, NORM: 1e-2})
    plan = planned(donor, variant, Policy.EXACT)
    assert {name for name, rung in plan.rungs.items() if rung is Rung.OWN} == {UP, NORM}
    # A block counts by its matrices: block 0 keeps a norm of its own and is still aliased.
    assert plan.blocks.to_json() == {"alias": 1, "residual": 0, "own": 1, "total": 2}


def test_exact_refuses_thresholds(tmp_path: Path, donor: Path) -> None:
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    with pytest.raises(InvalidRequestError, match="tau_cos"):
        planned(donor, variant, Policy.EXACT, tau_cos=0.9, tau_frob=0.1)


def test_donor_plan_owns_everything_once(tmp_path: Path) -> None:
    with Checkpoint.open(make_checkpoint(tmp_path / "d", tie=True)) as checkpoint:
        plan = plan_donor(checkpoint, fingerprint="f")
        assert plan.unique_bytes == plan.logical_bytes == checkpoint.nbytes
        assert plan.shared_bytes == 0
        assert set(plan.rungs.values()) == {Rung.OWN}


@pytest.mark.parametrize("policy", [Policy.THRESHOLDS, Policy.EXACT])
def test_plan_survives_json(tmp_path: Path, donor: Path, policy: Policy) -> None:
    plan = planned(donor, make_variant(tmp_path / "v", donor, scale={UP: 0.5}), policy)
    record = json.loads(json.dumps(plan.to_json()))
    assert SharePlan.from_json(record) == plan
    assert {"unique_bytes", "shared_bytes", "blocks_shared"} <= set(record)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "wide", "conservative"),
    [("instruct", 8, 1), ("chat", 8, 1), ("math", 1, 0), ("code", 0, 0)],
)
def test_plan_of_trained_family_shares_its_known_blocks(
    shared: Path, name: str, wide: int, conservative: int
) -> None:
    family = shared / "families" / "mini-qwen2"
    plan = planned(family / "base", family / name, tau_cos=0.99, tau_frob=0.06)
    assert plan.blocks_shared == wide
    assert planned(family / "base", family / name).blocks_shared == conservative
