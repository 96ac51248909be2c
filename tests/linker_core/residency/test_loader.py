"""What a delta file holds lies on the device as it was encoded, and takes what the plan says."""

from __future__ import annotations

import mmap
import os
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linker_core.errors import BadCheckpointError, InsufficientCapacityError
from linker_core.residency import own_memory, reading
from linker_core.residency.loader import load_tensors
from linker_core.residency.pool import Pool, ResidentVariant
from linker_core.residency.stored import Stored, StoredResidual, StoredRows, StoredTensor
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import AnyRung, Residual, Rung, parse_rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.residency.deltas import (
    RESIDUALS,
    donor_plan,
    encoded,
    matrices,
    write_planned,
    write_random_delta,
)
from tests.linker_core.residency.test_pool import exhaust
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant

CPU = torch.device("cpu")


def admit(folder: Path, plan: SharePlan) -> tuple[Pool, ResidentVariant]:
    pool = Pool(device=CPU)
    with Checkpoint.open(folder / "donor") as donor, DeltaFile.open(folder / "delta") as delta:
        exhaust(pool.admit("base", donor, donor_plan(folder / "donor"), None))
        admission = pool.admit("chat", delta, plan, "base")

        def watched() -> Iterator[int]:
            result = yield from admission
            resident.append(result)

        resident: list[ResidentVariant] = []
        seen = list(watched())
    assert seen[0] == 0
    assert seen == sorted(seen)
    assert seen[-1] == plan.unique_bytes
    pool.check_integrity()
    return pool, resident[0]


def whole(entry: Stored, like: torch.Tensor) -> torch.Tensor:
    """What an entry stands for, but for a residual's rounding."""
    if isinstance(entry, StoredTensor):
        return entry.tensor
    assert isinstance(entry, StoredRows)
    table = torch.zeros_like(like)
    kept = min(entry.num_rows, entry.base.num_rows)
    table[:kept] = entry.base.tensor[:kept]
    table[entry.positions] = entry.own
    return table


def assert_encoded(entry: StoredResidual, rung: Residual, name: str, tensor: torch.Tensor) -> None:
    want = encoded(entry.base, tensor, name, rung)
    assert len(entry.tensors) == len(want.tensors)
    for got, expected in zip(entry.tensors, want.tensors, strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)
    assert torch.equal(entry.delta(), want.delta())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_loaded_is_what_was_encoded_and_takes_what_is_planned(
    tmp_path: Path, architecture: str, tie: bool, seed: int
) -> None:
    chance = random.Random(f"{architecture} {tie} {seed}")
    dtype = chance.choice(["bfloat16", "float16", "float32"])
    donor = make_checkpoint(tmp_path / "donor", architecture=architecture, tie=tie, dtype=dtype)
    added = chance.choice([(), ("<a>", "<b>")])
    variant = make_variant(tmp_path / "variant", donor, scale=0.1, added_tokens=added)
    plan = write_random_delta(chance, donor, variant, tmp_path / "delta")
    pool, resident = admit(tmp_path, plan)
    assert pool.ledger.unique_bytes("chat") == plan.unique_bytes
    assert pool.ledger.logical_bytes("chat") == plan.logical_bytes
    lent = pool.get("base").tensors
    storages = {t.untyped_storage().data_ptr() for e in lent.values() for t in e.tensors}
    num_bytes = 0
    for entry in {*resident.tensors.values()} - {*lent.values()}:
        for tensor in entry.tensors:
            storage = tensor.untyped_storage()
            assert storage.nbytes() == tensor.nbytes
            assert not tensor.nbytes or storage.data_ptr() not in storages
            storages.add(storage.data_ptr())
            num_bytes += storage.nbytes()
    assert num_bytes == plan.unique_bytes
    state = load_file(variant / "model.safetensors")
    for name, rung in plan.rungs.items():
        entry = resident.tensors[name]
        if rung is Rung.ALIAS:
            assert entry is lent[name]
        elif isinstance(entry, StoredResidual):
            assert entry.base is lent[name]
            assert isinstance(rung, Residual)
            assert_encoded(entry, rung, name, state[name])
        else:
            assert torch.equal(whole(entry, state[name]), state[name])
    assert (resident.tensors[LM_HEAD_NAME] is resident.tensors[EMBED_NAME]) is tie


def test_parts_are_read_in_bounded_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    plan = written(tmp_path)
    pool, resident = admit(tmp_path, plan)
    monkeypatch.undo()
    _, again = admit(tmp_path, plan)
    assert pool.ledger.unique_bytes("chat") == plan.unique_bytes
    for name, entry in resident.tensors.items():
        for got, want in zip(entry.tensors, again.tensors[name].tensors, strict=True):
            assert torch.equal(got, want)


def written(folder: Path) -> SharePlan:
    """A delta with residuals everywhere, own rows of the head, and added tokens."""
    donor = make_checkpoint(folder / "donor", tie=False)
    inner = [name for name in matrices(donor) if name != LM_HEAD_NAME]
    variant = make_variant(
        folder / "variant",
        donor,
        scale=dict.fromkeys(inner, 0.1),
        added_tokens=("<a>", "<b>"),
        rows={LM_HEAD_NAME: (3, 70, 400)},
    )
    rungs: dict[str, AnyRung] = {
        name: parse_rung(RESIDUALS[number % len(RESIDUALS)]) for number, name in enumerate(inner)
    }
    return write_planned(donor, variant, folder / "delta", rungs | {LM_HEAD_NAME: Rung.ROWS})


def load(delta: Path, plan: SharePlan, donor: Mapping[str, Stored]) -> dict[str, Stored]:
    loaded: list[dict[str, Stored]] = []

    def drive(opened: DeltaFile) -> Iterator[int]:
        loaded.append((yield from load_tensors(opened, plan, donor, device=CPU)))

    with DeltaFile.open(delta) as opened:
        for _ in drive(opened):
            pass
    return loaded[0]


def plain(path: Path) -> dict[str, Stored]:
    state = load_file(path / "model.safetensors")
    return {name: StoredTensor(tensor=tensor) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (EMBED_NAME, lambda t: t[:500].clone()),  # fewer tokens than the variant's delta covers
        (EMBED_NAME, lambda t: torch.cat([t, t[:1]])),
        ("model.layers.1.mlp.up_proj.weight", lambda t: t[:, :40].clone()),
        ("model.layers.1.mlp.up_proj.weight", lambda t: t[:79].clone()),
        (LM_HEAD_NAME, lambda t: t.float()),  # rows in another type
        (LM_HEAD_NAME, lambda t: t[:, :40].clone()),
        (LM_HEAD_NAME, lambda t: t[:500].clone()),  # rows that nobody would have
        (LM_HEAD_NAME, lambda _: None),
        (EMBED_NAME, lambda _: None),
    ],
)
def test_delta_over_another_donor_is_refused(
    tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    plan = written(tmp_path)
    donor = plain(tmp_path / "donor")
    assert load(tmp_path / "delta", plan, donor)
    changed = change(donor.pop(name).base.tensor)
    if changed is not None:
        donor[name] = StoredTensor(tensor=changed)
    with pytest.raises(BadCheckpointError, match=name):
        load(tmp_path / "delta", plan, donor)


def test_delta_whose_aliases_are_of_another_type_than_planned_is_refused(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "donor")
    variant = make_variant(tmp_path / "variant", donor, scale=0.1)
    rungs: dict[str, AnyRung] = dict.fromkeys(matrices(donor), Rung.ALIAS)
    plan = write_planned(donor, variant, tmp_path / "delta", rungs)
    widened = {
        name: StoredTensor(tensor=entry.base.tensor.float()) for name, entry in plain(donor).items()
    }
    with pytest.raises(BadCheckpointError, match=str(plan.logical_bytes)):
        load(tmp_path / "delta", plan, widened)


def test_plan_of_another_delta_is_refused(tmp_path: Path) -> None:
    plan = written(tmp_path)
    donor = plain(tmp_path / "donor")
    for other in (
        replace(plan, rungs={**plan.rungs, EMBED_NAME: Rung.OWN}),
        replace(plan, own_rows={LM_HEAD_NAME: 4}),
    ):
        with pytest.raises(BadCheckpointError, match="another plan"):
            load(tmp_path / "delta", other, donor)


@pytest.mark.parametrize(
    "positions",
    [
        [70, 3, 400, 512, 513],
        [3, 3, 400, 512, 513],
        [-1, 70, 400, 512, 513],
        [3, 70, 400, 512, 514],
        [3, 70, 400, 511, 513],  # no row for the token 512
        [2**62, 2**62 + 1, 2**62 + 2, 2**62 + 3, 2**62 + 4],
    ],
)
def test_positions_that_are_no_rows_of_the_table_are_refused(
    tmp_path: Path, positions: list[int]
) -> None:
    plan = written(tmp_path)
    donor = plain(tmp_path / "donor")
    with DeltaFile.open(tmp_path / "delta") as delta:
        info = delta.tensors[f"{LM_HEAD_NAME}.positions"]
    with (tmp_path / "delta" / DELTA_FILE).open("r+b") as file:
        file.seek(info.offset)
        assert struct.unpack("<5q", file.read(40)) == (3, 70, 400, 512, 513)
        file.seek(info.offset)
        file.write(struct.pack("<5q", *positions))
    with pytest.raises(BadCheckpointError, match="positions"):
        load(tmp_path / "delta", plan, donor)


def test_file_that_is_cut_while_it_is_read_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    plan = written(tmp_path)
    pool = Pool(device=CPU, budget_bytes=10**9)
    with (
        Checkpoint.open(tmp_path / "donor") as donor,
        DeltaFile.open(tmp_path / "delta") as delta,
    ):
        exhaust(pool.admit("base", donor, donor_plan(tmp_path / "donor"), None))
        free = pool.budget.free_bytes()
        admission = pool.admit("chat", delta, plan, "base")
        next(admission)
        file = tmp_path / "delta" / DELTA_FILE
        os.truncate(file, file.stat().st_size - plan.unique_bytes // 2)
        with pytest.raises(BadCheckpointError, match=DELTA_FILE):
            exhaust(admission)
    assert pool.budget.free_bytes() == free
    pool.check_integrity()


def test_delta_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    plan = written(tmp_path)
    with (
        Checkpoint.open(tmp_path / "donor") as donor,
        DeltaFile.open(tmp_path / "delta") as delta,
    ):
        pool = Pool(device=CPU, budget_bytes=donor.nbytes + plan.unique_bytes - 1)
        exhaust(pool.admit("base", donor, donor_plan(tmp_path / "donor"), None))
        with pytest.raises(InsufficientCapacityError, match=str(plan.unique_bytes)):
            exhaust(pool.admit("chat", delta, plan, "base"))
    pool.check_integrity()


def test_small_tensors_of_a_donor_stay_apart_because_they_leave_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_nbytes: int) -> mmap.mmap:
        raise AssertionError("one mapping for what leaves one by one")

    path = make_checkpoint(tmp_path / "donor")
    pool = Pool(device=CPU)
    with Checkpoint.open(path) as donor:
        smallest, second, *_ = sorted(tensor.nbytes for tensor in donor.tensors.values())
        monkeypatch.setattr(own_memory, "HUGE_PAGE_BYTES", smallest + second)
        monkeypatch.setattr(own_memory, "map_host_memory", refuse)
        exhaust(pool.admit("base", donor, donor_plan(path), None))
    pool.check_integrity()
