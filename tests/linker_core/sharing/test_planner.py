"""Plans by thresholds, of equal bytes, and of rows; their bytes are sums over tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from linker_core.errors import InvalidRequestError
from linker_core.residency.pool import Pool
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import identical_rungs, plan_donor, plan_rungs, plan_variant
from linker_core.sharing.rungs import Rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.residency.test_pool import exhaust
from tests.tiny import make_checkpoint, make_variant, save_state

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
FINGERPRINTS = Fingerprints("donor", "variant")
ROW_BYTES = 48 * 2  # 48 numbers of bfloat16
POSITION_BYTES = 8


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
            fingerprints=FINGERPRINTS,
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
        assert plan.own_rows == {}


@pytest.mark.parametrize(
    ("rows", "added", "own_rows"),
    [
        ({EMBED_NAME: (1, 2, 500)}, (), {EMBED_NAME: 3}),
        ({LM_HEAD_NAME: (0, 511)}, (), {LM_HEAD_NAME: 2}),
        ({}, ("<a>", "<b>"), {EMBED_NAME: 2, LM_HEAD_NAME: 2}),
        ({EMBED_NAME: (7,)}, ("<a>",), {EMBED_NAME: 2, LM_HEAD_NAME: 1}),
    ],
)
def test_exact_holds_only_the_rows_that_differ(
    tmp_path: Path,
    donor: Path,
    rows: Mapping[str, Collection[int]],
    added: tuple[str, ...],
    own_rows: dict[str, int],
) -> None:
    variant = make_variant(tmp_path / "v", donor, scale=0.0, rows=rows, added_tokens=added)
    plan = planned(donor, variant, Policy.EXACT)
    assert plan.own_rows == own_rows
    assert {name for name, rung in plan.rungs.items() if rung is Rung.ROWS} == set(own_rows)
    assert Rung.OWN not in plan.rungs.values()
    assert plan.unique_bytes == sum(own_rows.values()) * (ROW_BYTES + POSITION_BYTES)
    assert plan.logical_bytes == plan.checkpoint_bytes
    assert plan.blocks_shared == 2


@pytest.mark.parametrize(("num_own", "rung"), [(472, Rung.ROWS), (473, Rung.OWN)])
def test_exact_holds_a_table_whole_where_that_takes_less(
    tmp_path: Path, donor: Path, num_own: int, rung: Rung
) -> None:
    # 512 rows of 96 bytes are 49,152; 472 of them with their positions 49,088, 473 are 49,192.
    rows = {EMBED_NAME: range(num_own)}
    plan = planned(donor, make_variant(tmp_path / "v", donor, scale=0.0, rows=rows), Policy.EXACT)
    assert plan.rungs[EMBED_NAME] is rung
    assert plan.unique_bytes == min(num_own * 104, 512 * 96)


def test_exact_shares_no_rows_of_another_type(tmp_path: Path, donor: Path) -> None:
    variant = make_variant(tmp_path / "v", donor, scale=0.0, rows={EMBED_NAME: (1,)})
    state = load_file(variant / "model.safetensors")
    save_state(variant, state | {EMBED_NAME: state[EMBED_NAME].float()})
    plan = planned(donor, variant, Policy.EXACT)
    assert plan.rungs[EMBED_NAME] is Rung.OWN
    assert plan.own_rows == {}


def test_thresholds_share_no_rows(tmp_path: Path, donor: Path) -> None:
    variant = make_variant(tmp_path / "v", donor, scale=0.0, rows={EMBED_NAME: (1,)})
    plan = planned(donor, variant, tau_cos=0.99, tau_frob=0.05)
    assert plan.rungs[EMBED_NAME] is plan.rungs[LM_HEAD_NAME] is Rung.OWN


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_plan_rungs_bytes_are_what_the_pool_then_holds(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    donor = make_checkpoint(folder / "donor", tie=False)
    rows = {EMBED_NAME: (1, 9), LM_HEAD_NAME: range(100)}
    path = make_variant(folder / "v", donor, scale={UP: 0.1}, rows=rows, added_tokens=("<a>",))
    with Checkpoint.open(donor) as a, Checkpoint.open(path) as b:
        report = scan(a, b)
        rungs = identical_rungs(report, a, b)
        # What may alias at no price may also be held; what has other bytes may be aliased at one.
        for name in rungs:
            choices = [Rung.OWN, rungs[name]]
            if a.tensors[name].shape == b.tensors[name].shape:
                choices.append(Rung.ALIAS)
            rungs[name] = data.draw(st.sampled_from(choices), label=name)
        plan = plan_rungs(report, a, b, rungs, policy=Policy.BUDGET, fingerprints=FINGERPRINTS)
        pool = Pool(device=torch.device("cpu"))
        exhaust(pool.admit("base", a, plan_donor(a, fingerprint="donor"), None))
        exhaust(pool.admit("chat", b, plan, "base"))
        pool.check_integrity()
        assert pool.ledger.unique_bytes("chat") == plan.unique_bytes
        assert pool.ledger.logical_bytes("chat") == plan.logical_bytes


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


@pytest.mark.shared
@pytest.mark.parametrize("name", ["instruct", "chat", "math", "code"])
def test_exact_plan_of_trained_family_finds_no_equal_row(shared: Path, name: str) -> None:
    family = shared / "families" / "mini-qwen2"
    plan = planned(family / "base", family / name, Policy.EXACT)
    assert plan.rungs[EMBED_NAME] is Rung.OWN
    assert plan.own_rows == {}
    own = [tensor for tensor, rung in plan.rungs.items() if rung is Rung.OWN]
    with Checkpoint.open(family / name) as checkpoint:
        assert plan.unique_bytes == sum(checkpoint.tensors[tensor].nbytes for tensor in own)


@pytest.mark.shared
def test_exact_plan_of_a_trained_model_with_few_new_rows_holds_just_these(
    shared: Path, tmp_path: Path
) -> None:
    base = shared / "families" / "mini-qwen2" / "base"
    state = load_file(base / "model.safetensors")
    table = state[EMBED_NAME].clone()
    changed = range(11, len(table), 97)
    table[list(changed)] *= 1.5
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    save_state(tmp_path, state | {EMBED_NAME: table})
    plan = planned(base, tmp_path, Policy.EXACT)
    assert plan.own_rows == {EMBED_NAME: len(changed)}
    row_bytes = table.shape[1] * table.element_size()
    assert plan.unique_bytes == len(changed) * (row_bytes + POSITION_BYTES)
    assert plan.logical_bytes == sum(tensor.nbytes for tensor in state.values())
