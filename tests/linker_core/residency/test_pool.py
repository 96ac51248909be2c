"""Admission is all or nothing, aliases are the donor's storage, and bytes are the plan's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safetensors.torch import load_file

from linker_core.errors import (
    BadCheckpointError,
    ConflictError,
    InsufficientCapacityError,
    ModelNotFoundError,
)
from linker_core.residency.pool import Pool, ResidentVariant
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_donor, plan_variant
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant, save_state

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


class Family:
    """A donor and a near variant on disk, with their plans."""

    def __init__(self, folder: Path, *, tie: bool = True, added: tuple[str, ...] = ()) -> None:
        donor = make_checkpoint(folder / "donor", tie=tie)
        variant = make_variant(folder / "variant", donor, scale={UP: 0.9}, added_tokens=added)
        self.donor = Checkpoint.open(donor)
        self.variant = Checkpoint.open(variant)
        self.donor_plan = plan_donor(self.donor, fingerprint="donor")
        self.plan = plan_variant(
            scan(self.donor, self.variant),
            self.donor,
            self.variant,
            policy=Policy.THRESHOLDS,
            fingerprints=Fingerprints("donor", "variant"),
            tau_cos=0.99,
            tau_frob=0.05,
        )

    def admit_both(self, pool: Pool) -> tuple[ResidentVariant, ResidentVariant]:
        donor = exhaust(pool.admit("base", self.donor, self.donor_plan, None))
        return donor, exhaust(pool.admit("chat", self.variant, self.plan, "base"))


def exhaust(admission: Generator[int, None, ResidentVariant]) -> ResidentVariant:
    returned: list[ResidentVariant] = []

    def drive() -> Generator[int, None, None]:
        returned.append((yield from admission))

    for _ in drive():
        pass
    return returned[0]


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    made = Family(tmp_path)
    with made.donor, made.variant:
        yield made


def test_admit_holds_every_word_as_on_disk(family: Family) -> None:
    pool = Pool(device=CPU)
    _, variant = family.admit_both(pool)
    state = load_file(family.variant.path / "model.safetensors")
    for name in family.variant.tensors:
        if name.startswith("model.layers.0."):
            continue  # aliased
        assert torch.equal(variant.tensors[name].base.tensor, state[name])
        assert variant.tensors[name].base.tensor.dtype == torch.bfloat16


def test_admit_alias_is_the_donors_stored_tensor(family: Family) -> None:
    donor, variant = family.admit_both(Pool(device=CPU))
    for name, stored in variant.tensors.items():
        assert (stored is donor.tensors[name]) is name.startswith("model.layers.0.")


def test_admit_tied_head_is_the_embedding(family: Family) -> None:
    for resident in family.admit_both(Pool(device=CPU)):
        assert resident.tensors["lm_head.weight"] is resident.tensors["model.embed_tokens.weight"]


def test_ledger_bytes_are_the_plans(family: Family) -> None:
    pool = Pool(device=CPU)
    family.admit_both(pool)
    ledger = pool.ledger
    assert ledger.unique_bytes("base") == ledger.logical_bytes("base") == family.donor.nbytes
    assert ledger.shared_bytes("base") == 0
    assert ledger.unique_bytes("chat") == family.plan.unique_bytes
    assert ledger.shared_bytes("chat") == family.plan.shared_bytes
    assert ledger.resident_bytes() == family.donor.nbytes + family.plan.unique_bytes
    pool.check_integrity()


def test_admit_yields_progress_up_to_the_unique_bytes(family: Family) -> None:
    pool = Pool(device=CPU)
    exhaust(pool.admit("base", family.donor, family.donor_plan, None))
    admission = pool.admit("chat", family.variant, family.plan, "base")
    seen = list(admission)
    assert seen == sorted(seen)
    assert seen[-1] == family.plan.unique_bytes


def test_remove_frees_the_unique_tensors_and_only_them(family: Family) -> None:
    pool = Pool(device=CPU)
    donor, variant = family.admit_both(pool)
    own = weakref.ref(variant.tensors[UP].base.tensor)
    shared = weakref.ref(donor.tensors["model.layers.0.mlp.up_proj.weight"].base.tensor)
    del donor, variant
    assert pool.remove("chat") == family.plan.unique_bytes
    gc.collect()
    assert own() is None
    assert shared() is not None
    assert pool.ledger.resident_bytes() == family.donor.nbytes


def test_remove_donor_in_use_names_its_dependants(family: Family) -> None:
    pool = Pool(device=CPU)
    family.admit_both(pool)
    with pytest.raises(ConflictError, match="chat"):
        pool.remove("base")
    assert [v.model for v in pool.models()] == ["base", "chat"]
    pool.remove("chat")
    assert pool.remove("base") == family.donor.nbytes


def test_admit_abandoned_half_way_leaves_the_pool_as_it_was(family: Family) -> None:
    pool = Pool(device=CPU, budget_bytes=10**9)
    exhaust(pool.admit("base", family.donor, family.donor_plan, None))
    free = pool.budget.free_bytes()
    admission = pool.admit("chat", family.variant, family.plan, "base")
    next(admission)
    assert pool.budget.free_bytes() == free - family.plan.unique_bytes
    admission.close()
    assert pool.budget.free_bytes() == free
    assert [v.model for v in pool.models()] == ["base"]
    pool.check_integrity()


def test_admit_failed_allocation_leaves_the_pool_as_it_was(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(device=CPU, budget_bytes=10**9)
    exhaust(pool.admit("base", family.donor, family.donor_plan, None))
    free, calls = pool.budget.free_bytes(), 0
    allocate = torch.empty

    def fail_third(*size: object, **options: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return allocate(*size, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", fail_third)
    with pytest.raises(InsufficientCapacityError):
        exhaust(pool.admit("chat", family.variant, family.plan, "base"))
    assert pool.budget.free_bytes() == free
    pool.check_integrity()


@pytest.mark.parametrize("missing", [1, 10_000])
def test_admit_beyond_the_budget_says_what_is_needed_and_free(family: Family, missing: int) -> None:
    needed = family.donor.nbytes + family.plan.unique_bytes
    pool = Pool(device=CPU, budget_bytes=needed - missing)
    exhaust(pool.admit("base", family.donor, family.donor_plan, None))
    with pytest.raises(InsufficientCapacityError, match=str(family.plan.unique_bytes)):
        exhaust(pool.admit("chat", family.variant, family.plan, "base"))
    exact = Pool(device=CPU, budget_bytes=needed)
    family.admit_both(exact)
    assert exact.budget.free_bytes() == 0


def test_kv_reservation_counts_against_the_budget(family: Family) -> None:
    pool = Pool(device=CPU, budget_bytes=family.donor.nbytes + 100)
    exhaust(pool.admit("base", family.donor, family.donor_plan, None))
    with pytest.raises(InsufficientCapacityError, match="KV"):
        pool.budget.reserve_kv("base", 101)
    pool.budget.reserve_kv("base", 100)
    assert (pool.budget.kv_bytes(), pool.budget.free_bytes()) == (100, 0)
    pool.budget.release_kv("base")
    assert pool.budget.free_bytes() == 100


def test_reservation_counts_against_the_budget_and_may_be_released_twice() -> None:
    pool = Pool(device=CPU, budget_bytes=100)
    pool.budget.reserve("tuner", 60)
    with pytest.raises(InsufficientCapacityError, match=r"^41 bytes .* second, 40 are"):
        pool.budget.reserve("second", 41)
    with pytest.raises(ConflictError, match="tuner"):
        pool.budget.reserve("tuner", 1)
    assert (pool.budget.reserved_bytes(), pool.budget.free_bytes()) == (60, 40)
    pool.budget.release("tuner")
    pool.budget.release("tuner")
    assert (pool.budget.reserved_bytes(), pool.budget.free_bytes()) == (0, 100)


def test_rename_frees_the_name_and_leaves_the_donor_in_use(family: Family) -> None:
    pool = Pool(device=CPU)
    family.admit_both(pool)
    pool.rename("chat", "chat (leaving)")
    exhaust(pool.admit("chat", family.variant, family.plan, "base"))
    pool.check_integrity()
    assert pool.ledger.dependants("base") == ["chat (leaving)", "chat"]
    assert pool.ledger.resident_bytes() == family.donor.nbytes + 2 * family.plan.unique_bytes
    assert pool.remove("chat (leaving)") == family.plan.unique_bytes
    assert [variant.model for variant in pool.models()] == ["base", "chat"]


def test_admit_same_name_twice_is_a_conflict(family: Family) -> None:
    pool = Pool(device=CPU)
    family.admit_both(pool)
    with pytest.raises(ConflictError):
        exhaust(pool.admit("chat", family.variant, family.plan, "base"))


def test_admit_without_its_donor_is_not_found(family: Family) -> None:
    with pytest.raises(ModelNotFoundError):
        exhaust(Pool(device=CPU).admit("chat", family.variant, family.plan, "base"))


def test_admit_plan_of_another_donor_is_a_conflict(family: Family) -> None:
    pool = Pool(device=CPU)
    other = plan_donor(family.donor, fingerprint="other")
    exhaust(pool.admit("base", family.donor, other, None))
    with pytest.raises(ConflictError, match="another donor"):
        exhaust(pool.admit("chat", family.variant, family.plan, "base"))


def test_admit_plan_of_another_checkpoint_is_refused(family: Family) -> None:
    record = family.plan.to_json()
    del record["rungs"][UP]
    pool = Pool(device=CPU)
    exhaust(pool.admit("base", family.donor, family.donor_plan, None))
    with pytest.raises(BadCheckpointError, match="other tensors"):
        exhaust(pool.admit("chat", family.variant, SharePlan.from_json(record), "base"))


def test_admit_alias_of_another_shape_is_refused(tmp_path: Path) -> None:
    made = Family(tmp_path, added=("<a>", "<b>"))
    record = made.plan.to_json()
    record["rungs"]["model.embed_tokens.weight"] = "alias"
    with made.donor, made.variant:
        pool = Pool(device=CPU)
        exhaust(pool.admit("base", made.donor, made.donor_plan, None))
        with pytest.raises(BadCheckpointError, match="embed_tokens"):
            exhaust(pool.admit("chat", made.variant, SharePlan.from_json(record), "base"))


class PoolMachine(RuleBasedStateMachine):
    """Any order of admissions, abandoned admissions and removals keeps the pool whole."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.family = Family.__new__(Family)
        self.family.donor = self.stack.enter_context(Checkpoint.open(self.folder / "donor"))
        self.family.variant = self.stack.enter_context(Checkpoint.open(self.folder / "variant"))
        self.donor_plan = plan_donor(self.family.donor, fingerprint="donor")
        self.plan = plan_variant(
            scan(self.family.donor, self.family.variant),
            self.family.donor,
            self.family.variant,
            policy=Policy.EXACT,
            fingerprints=Fingerprints("donor", "variant"),
        )
        room_for_two = self.family.donor.nbytes + 2 * self.plan.unique_bytes
        self.pool = Pool(device=CPU, budget_bytes=room_for_two)
        self.reserved: dict[str, int] = {}

    @rule(steps=st.integers(0, 40))
    @precondition(lambda self: not self.resident("base"))
    def admit_donor(self, steps: int) -> None:
        admission = self.pool.admit("base", self.family.donor, self.donor_plan, None)
        try:
            self.advance(admission, steps)
        except InsufficientCapacityError:
            assert self.reserved

    @rule(name=st.sampled_from("abc"), steps=st.integers(0, 5))
    def admit_variant(self, name: str, steps: int) -> None:
        admission = self.pool.admit(name, self.family.variant, self.plan, "base")
        try:
            self.advance(admission, steps)
        except ConflictError:
            assert self.resident(name)
        except ModelNotFoundError:
            assert not self.resident("base")
        except InsufficientCapacityError:
            assert self.reserved or len(self.pool.models()) == 3

    @rule(name=st.sampled_from(["base", *"abc"]))
    def remove(self, name: str) -> None:
        before = self.pool.budget.free_bytes()
        try:
            freed = self.pool.remove(name)
        except ModelNotFoundError:
            assert not self.resident(name)
        except ConflictError:
            assert name == "base"
            assert len(self.pool.models()) > 1
        else:
            assert self.pool.budget.free_bytes() == before + freed

    @rule(old=st.sampled_from("abc"), new=st.sampled_from("abc"))
    def rename(self, old: str, new: str) -> None:
        if not self.resident(old) or self.resident(new):
            return
        tensors = self.pool.get(old).tensors
        sizes = (self.pool.ledger.unique_bytes(old), self.pool.budget.free_bytes())
        self.pool.rename(old, new)
        assert self.pool.get(new).tensors is tensors
        assert not self.resident(old)
        assert sizes == (self.pool.ledger.unique_bytes(new), self.pool.budget.free_bytes())

    @rule(name=st.sampled_from("xy"), nbytes=st.integers(0, 200_000))
    def reserve(self, name: str, nbytes: int) -> None:
        free = self.pool.budget.free_bytes()
        try:
            self.pool.budget.reserve(name, nbytes)
        except ConflictError:
            assert name in self.reserved
        except InsufficientCapacityError:
            assert nbytes > free
        else:
            self.reserved[name] = nbytes
            assert self.pool.budget.free_bytes() == free - nbytes

    @rule(name=st.sampled_from("xy"))
    def release(self, name: str) -> None:
        free = self.pool.budget.free_bytes()
        self.pool.budget.release(name)
        assert self.pool.budget.free_bytes() == free + self.reserved.pop(name, 0)

    @invariant()
    def whole(self) -> None:
        self.pool.check_integrity()

    def resident(self, name: str) -> bool:
        return name in {variant.model for variant in self.pool.models()}

    def advance(self, admission: Generator[int, None, ResidentVariant], steps: int) -> None:
        for _ in range(steps):
            if next(admission, None) is None:
                return
        admission.close()

    def teardown(self) -> None:
        self.stack.close()


def test_pool_survives_any_order_of_operations(tmp_path: Path) -> None:
    rows = {"model.embed_tokens.weight": (0, 77, 510)}
    donor = make_checkpoint(tmp_path / "donor")
    make_variant(tmp_path / "variant", donor, scale={UP: 0.1}, rows=rows)

    class Machine(PoolMachine):
        folder = tmp_path

    Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
    Machine.TestCase().runTest()


def test_admissions_of_one_name_at_once_are_a_conflict(family: Family) -> None:
    pool = Pool(device=CPU)
    exhaust(pool.admit("base", family.donor, family.donor_plan, None))
    first = pool.admit("chat", family.variant, family.plan, "base")
    next(first)
    with pytest.raises(ConflictError):
        next(pool.admit("chat", family.variant, family.plan, "base"))
    exhaust(first)
    pool.check_integrity()


def test_donor_of_what_is_being_admitted_stays(family: Family) -> None:
    pool = Pool(device=CPU, budget_bytes=10**9)
    exhaust(pool.admit("base", family.donor, family.donor_plan, None))
    admission = pool.admit("chat", family.variant, family.plan, "base")
    next(admission)
    with pytest.raises(ConflictError, match="donor of chat"):
        pool.remove("base")
    exhaust(admission)
    pool.check_integrity()
    assert [variant.model for variant in pool.models()] == ["base", "chat"]


def test_without_a_budget_the_device_is_promised_only_once() -> None:
    pool = Pool(device=CPU)
    pool.budget.reserve_kv("a", pool.budget.free_bytes() * 2 // 3)
    with pytest.raises(InsufficientCapacityError):
        pool.budget.reserve_kv("b", pool.budget.free_bytes() * 2)


def test_alias_of_another_type_counts_what_is_resident(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "donor")
    state = load_file(donor / "model.safetensors")
    variant = make_variant(tmp_path / "variant", donor, scale={UP: 0.9})
    widened = load_file(variant / "model.safetensors")
    save_state(variant, {name: tensor.float() for name, tensor in widened.items()})
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        plan = plan_variant(
            scan(a, b),
            a,
            b,
            policy=Policy.THRESHOLDS,
            fingerprints=Fingerprints("donor", "variant"),
            tau_cos=0.99,
            tau_frob=0.05,
        )
        pool = Pool(device=CPU)
        exhaust(pool.admit("base", a, plan_donor(a, fingerprint="donor"), None))
        exhaust(pool.admit("chat", b, plan, "base"))
        pool.check_integrity()
        aliased = sum(t.nbytes for n, t in state.items() if n.startswith("model.layers.0."))
        assert plan.shared_bytes == pool.ledger.shared_bytes("chat") == aliased
        assert plan.checkpoint_bytes == 2 * a.nbytes
