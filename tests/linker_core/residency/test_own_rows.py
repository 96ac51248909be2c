"""Only rows that are not the donor's are kept, and they are exactly those that differ."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from linker_core.errors import BadCheckpointError
from linker_core.residency import own_rows
from linker_core.residency.own_rows import load_rows
from linker_core.residency.pool import Pool
from linker_core.residency.stored import StoredRows, StoredTensor
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_donor, plan_variant
from linker_core.sharing.rungs import Rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.residency.test_pool import exhaust
from tests.tiny import make_checkpoint, make_variant, save_state

CPU = torch.device("cpu")
ROWS = 512
ROW_BYTES = 48 * 2  # 48 numbers of bfloat16
POSITION_BYTES = 8


@pytest.fixture(params=[1 << 22, 1000], ids=["one chunk", "many chunks"], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_rows, "CHUNK_BYTES", request.param)


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "donor")


def exact_plan(donor: Checkpoint, variant: Checkpoint) -> SharePlan:
    return plan_variant(
        scan(donor, variant),
        donor,
        variant,
        policy=Policy.EXACT,
        fingerprints=Fingerprints("donor", "variant"),
    )


def cut_vocabulary(path: Path, num_rows: int) -> None:
    """Lets a checkpoint have only its first tokens."""
    state = load_file(path / "model.safetensors")
    state[EMBED_NAME] = state[EMBED_NAME][:num_rows].clone()
    save_state(path, state)
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(record | {"vocab_size": num_rows}))


def admit(donor: Path, variant: Path) -> tuple[Pool, SharePlan, StoredRows]:
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        plan = exact_plan(a, b)
        pool = Pool(device=CPU)
        exhaust(pool.admit("base", a, plan_donor(a, fingerprint="donor"), None))
        resident = exhaust(pool.admit("chat", b, plan, "base"))
    pool.check_integrity()
    table = resident.tensors[EMBED_NAME]
    assert isinstance(table, StoredRows)
    assert resident.tensors[LM_HEAD_NAME] is table
    assert table.base is pool.get("base").tensors[EMBED_NAME]
    return pool, plan, table


def whole(table: StoredRows) -> torch.Tensor:
    """The table that a separate copy would be."""
    rows = torch.zeros(table.num_rows, table.own.shape[1], dtype=table.own.dtype)
    kept = min(table.num_rows, table.base.num_rows)
    rows[:kept] = table.base.tensor[:kept]
    rows[table.positions] = table.own
    return rows


@pytest.mark.parametrize(
    ("changed", "added"), [((), 2), ((0,), 0), ((511,), 1), ((3, 4, 5, 200), 2)]
)
def test_admit_keeps_the_differing_rows_and_no_other(
    tmp_path: Path, donor: Path, changed: Collection[int], added: int
) -> None:
    tokens = [f"<{n}>" for n in range(added)]
    variant = make_variant(
        tmp_path / "v", donor, scale=0.0, rows={EMBED_NAME: changed}, added_tokens=tokens
    )
    pool, plan, table = admit(donor, variant)
    assert table.positions.tolist() == [*sorted(changed), *range(ROWS, ROWS + added)]
    assert table.positions.dtype == torch.int64
    state = load_file(variant / "model.safetensors")
    assert torch.equal(whole(table), state[EMBED_NAME])
    assert plan.own_rows == {EMBED_NAME: len(changed) + added}
    assert plan.unique_bytes == (len(changed) + added) * (ROW_BYTES + POSITION_BYTES)
    assert pool.ledger.unique_bytes("chat") == plan.unique_bytes
    assert pool.ledger.logical_bytes("chat") == sum(tensor.nbytes for tensor in state.values())


def test_admit_vocabulary_that_is_the_donors_first_rows_holds_no_row(
    tmp_path: Path, donor: Path
) -> None:
    variant = make_variant(tmp_path / "v", donor, scale=0.0)
    cut_vocabulary(variant, 500)
    pool, plan, table = admit(donor, variant)
    assert (table.num_rows, len(table.own)) == (500, 0)
    assert plan.unique_bytes == pool.ledger.unique_bytes("chat") == 0
    shorter = 12 * ROW_BYTES
    donor_bytes = pool.ledger.logical_bytes("base")
    assert pool.ledger.logical_bytes("chat") == donor_bytes - shorter


def test_rows_are_told_apart_by_their_bytes(tmp_path: Path, donor: Path) -> None:
    state = load_file(donor / "model.safetensors")
    state[EMBED_NAME][7, 0] = 0.0
    save_state(donor, state)
    state[EMBED_NAME][7, 0] = -0.0
    variant = make_variant(tmp_path / "v", donor, scale=0.0)
    save_state(variant, state)
    _, _, table = admit(donor, variant)
    assert table.positions.tolist() == [7]


@given(changed=st.sets(st.integers(0, ROWS - 1)), added=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_ledger_bytes_are_the_plans_for_any_set_of_rows(
    tmp_path_factory: pytest.TempPathFactory, changed: set[int], added: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    donor = make_checkpoint(folder / "donor")
    variant = make_variant(
        folder / "v",
        donor,
        scale=0.0,
        rows={EMBED_NAME: changed},
        added_tokens=[f"<{n}>" for n in range(added)],
    )
    num_own, num_rows = len(changed) + added, ROWS + added
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        plan = exact_plan(a, b)
        pool = Pool(device=CPU)
        exhaust(pool.admit("base", a, plan_donor(a, fingerprint="donor"), None))
        exhaust(pool.admit("chat", b, plan, "base"))
        pool.check_integrity()
        if num_own == 0:
            cheapest, want = Rung.ALIAS, 0
        elif num_own * (ROW_BYTES + POSITION_BYTES) < num_rows * ROW_BYTES:
            cheapest, want = Rung.ROWS, num_own * (ROW_BYTES + POSITION_BYTES)
        else:
            cheapest, want = Rung.OWN, num_rows * ROW_BYTES
        assert plan.rungs[EMBED_NAME] is cheapest
        assert pool.ledger.unique_bytes("chat") == plan.unique_bytes == want
        assert pool.ledger.logical_bytes("chat") == plan.logical_bytes == b.nbytes
        assert pool.ledger.resident_bytes() == a.nbytes + want


@pytest.fixture
def pair(tmp_path: Path, donor: Path) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    variant = make_variant(tmp_path / "v", donor, scale=0.0, rows={EMBED_NAME: (1, 100, 400)})
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        yield a, b


@pytest.mark.parametrize("planned", [0, 2, 4])
def test_admit_another_number_of_rows_is_refused_and_leaves_nothing(
    pair: tuple[Checkpoint, Checkpoint], planned: int
) -> None:
    donor, variant = pair
    record = exact_plan(donor, variant).to_json()
    record["own_rows"] = {EMBED_NAME: planned}
    pool = Pool(device=CPU, budget_bytes=10**9)
    exhaust(pool.admit("base", donor, plan_donor(donor, fingerprint="donor"), None))
    free = pool.budget.free_bytes()
    with pytest.raises(BadCheckpointError, match="Scan again"):
        exhaust(pool.admit("chat", variant, SharePlan.from_json(record), "base"))
    assert pool.budget.free_bytes() == free
    pool.check_integrity()


@pytest.mark.parametrize(
    "base",
    [None, torch.zeros(ROWS, 48), torch.zeros(ROWS, 47, dtype=torch.bfloat16)],
    ids=["absent", "other type", "other width"],
)
def test_rows_of_what_the_donor_does_not_have_are_refused(
    pair: tuple[Checkpoint, Checkpoint], base: torch.Tensor | None
) -> None:
    stored = None if base is None else StoredTensor(tensor=base)
    with pytest.raises(BadCheckpointError, match="Scan again"):
        list(load_rows(pair[1], EMBED_NAME, stored, num_own=3))
