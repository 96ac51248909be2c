"""A donor leaves and a variant takes its place: only ownership moves, and no answer changes."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linker_core.engine.messages import (
    LoadFailed,
    LoadProgress,
    ModelUnloaded,
    UnloadFailed,
    UnloadModel,
)
from linker_core.sharing.rungs import Rung
from tests.linker_core.engine.driving import SMALL, Driver, load_message
from tests.linker_core.engine.kinfolk import (
    PARAMS,
    PROMPT,
    VARIANTS,
    Kinfolk,
    answer,
    load,
    make_kinfolk,
    said,
)
from tests.linker_core.engine.test_loading import slow_down
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def kinfolk(tmp_path_factory: pytest.TempPathFactory) -> Kinfolk:
    return make_kinfolk(tmp_path_factory.mktemp("kinfolk"))


def unload(driver: Driver, model: str, heir: str | None = None) -> list[object]:
    """Unloads a model; returns the events that end it."""
    before = len(driver.events)
    driver.engine.handle(UnloadModel(model=model, heir=heir))
    driver.run()
    return [e for e in driver.events[before:] if isinstance(e, ModelUnloaded | UnloadFailed)]


def refusal(driver: Driver, model: str, heir: str | None) -> str:
    (failed,) = (e for e in unload(driver, model, heir) if isinstance(e, UnloadFailed))
    assert failed.model == model
    return f"{failed.error['code']}: {failed.error['message']}"


def resident_bytes(driver: Driver) -> int:
    """What lies on the device, counted by storage."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for variant in driver.engine.residents.pool.models()
        for entry in variant.tensors.values()
        for tensor in (*entry.tensors, *entry.base.tensors)
    }
    return sum(storages.values())


def test_heir_is_the_donor_at_once_and_no_answer_changes(kinfolk: Kinfolk) -> None:
    names = ("base", "first", "rows", "delta")
    driver = kinfolk.driver(*names)
    running = {name: driver.submit(name, PROMPT, PARAMS) for name in names}
    driver.step()
    before = resident_bytes(driver)
    driver.engine.handle(UnloadModel(model="base", heir="delta"))
    driver.engine.handle(kinfolk.message("second", donor="delta"))
    assert list(driver.engine.residents.families) == ["delta"]
    late = driver.submit("base", PROMPT, PARAMS)
    driver.run()
    assert driver.errors[late]["code"] == "model_not_found"
    for name, request_id in running.items():
        assert said(driver, request_id) == kinfolk.alone(name, PROMPT)
    assert ModelUnloaded(model="base") in driver.events
    assert set(driver.snapshot().models) == {"first", "rows", "delta", "second"}
    for name in ("first", "rows", "delta", "second"):
        assert answer(driver, name, PROMPT) == kinfolk.alone(name, PROMPT)
    moved = kinfolk.plans["second"].unique_bytes
    assert driver.snapshot().device_weight_bytes == resident_bytes(driver) < before + moved


def test_donor_that_leaves_gives_back_what_nobody_reaches_and_copies_nothing(
    kinfolk: Kinfolk,
) -> None:
    driver = kinfolk.driver("base", "first", "second")
    pool = driver.engine.residents.pool
    stored = {name: stored.base.tensor for name, stored in pool.get("base").tensors.items()}
    before = pool.ledger.resident_bytes()
    reached = {
        name
        for name in stored
        if any(kinfolk.plans[kind].rungs[name] is Rung.ALIAS for kind in ("first", "second"))
    }
    assert 0 < len(reached) < len(stored)
    gone = [weakref.ref(tensor) for name, tensor in stored.items() if name not in reached]
    gone_bytes = sum(tensor.nbytes for name, tensor in stored.items() if name not in reached)
    kept = {name: stored[name].data_ptr() for name in reached}
    del stored
    driver.engine.handle(UnloadModel(model="base", heir="second"))
    told = driver.step()
    assert told
    driver.run()
    gc.collect()
    assert [ref for ref in gone if ref() is not None] == []
    assert pool.ledger.resident_bytes() == before - gone_bytes == resident_bytes(driver)
    for kind in ("first", "second"):
        tensors = pool.get(kind).tensors
        for name, address in kept.items():
            if kinfolk.plans[kind].rungs[name] is Rung.ALIAS:
                assert tensors[name].base.tensor.data_ptr() == address


def test_bytes_of_a_rehomed_family_are_what_its_models_hold(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("base", "first", "delta", "rows")
    ledger = driver.engine.residents.pool.ledger
    plain = driver.snapshot().models
    assert (plain["base"].unique, plain["base"].shared) == (plain["base"].logical, 0)
    running = driver.submit("base", PROMPT, PARAMS)
    driver.step()
    driver.engine.handle(UnloadModel(model="base", heir="delta"))
    driver.step()
    # The old donor still runs: what only it reaches is its own, and the rest is the heir's.
    told = driver.snapshot()
    assert sum(model.unique for model in told.models.values()) == told.device_weight_bytes
    assert 0 < told.models["base"].unique < plain["base"].unique
    only_the_base = told.models["base"].unique
    before = told.device_weight_bytes
    driver.run()
    assert said(driver, running) == kinfolk.alone("base", PROMPT)
    told = driver.snapshot()
    assert told.device_weight_bytes == before - only_the_base
    assert sum(model.unique for model in told.models.values()) == told.device_weight_bytes
    assert all(model.shared >= 0 for model in told.models.values())
    for name in ("first", "rows"):
        unique, resident = told.models[name].unique, ledger.resident_bytes()
        unload(driver, name)
        assert ledger.resident_bytes() == resident - unique
        told = driver.snapshot()
    # What is left is the delta and the part of the base that it leans on.
    with_base = told.models["delta"]
    assert with_base.unique == resident_bytes(driver) > kinfolk.plans["delta"].unique_bytes
    assert with_base.shared == max(0, with_base.logical - with_base.unique)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_tensors_that_were_freed_are_read_again_with_who_leans_on_them(
    tmp_path: Path, *, tie: bool
) -> None:
    kinfolk = make_kinfolk(tmp_path, tie=tie)
    driver = kinfolk.driver("base", "first")
    unload(driver, "base", heir="first")
    for kind in ("second", "rows", "delta", "mirror"):
        before = resident_bytes(driver)
        progress = len(driver.events)
        loaded = load(driver, kinfolk.message(kind, donor="first"))
        assert answer(driver, kind, PROMPT) == kinfolk.alone(kind, PROMPT)
        moved = resident_bytes(driver) - before
        assert moved == driver.engine.residents.pool.get(kind).moved_bytes
        assert moved == loaded.bytes.unique >= kinfolk.plans[kind].unique_bytes
        assert moved > kinfolk.plans[kind].unique_bytes or kind == "delta"
        reports = [e for e in driver.events[progress:] if isinstance(e, LoadProgress)]
        assert all(report.done_bytes <= report.total_bytes == moved for report in reports)
    # Everything is back, once.
    everyone = ("first", "second", "rows", "delta", "mirror")
    own = sum(kinfolk.plans[kind].unique_bytes for kind in everyone)
    assert resident_bytes(driver) == kinfolk.plans["base"].unique_bytes + own
    assert answer(driver, "first", PROMPT) == kinfolk.alone("first", PROMPT)


@pytest.mark.parametrize("founder", VARIANTS)
def test_variant_founds_a_family_over_its_base_and_answers_as_before(
    kinfolk: Kinfolk, founder: str
) -> None:
    driver = kinfolk.driver(founder)
    told = driver.snapshot()
    assert told.models[founder].unique == told.device_weight_bytes == resident_bytes(driver)
    assert answer(driver, founder, PROMPT) == kinfolk.alone(founder, PROMPT)
    other = "first" if founder == "delta" else "delta"
    load(driver, kinfolk.message(other, donor=founder))
    assert answer(driver, other, PROMPT) == kinfolk.alone(other, PROMPT)
    assert answer(driver, founder, PROMPT) == kinfolk.alone(founder, PROMPT)
    assert isinstance(unload(driver, founder)[0], UnloadFailed)
    for name in (other, founder):
        assert unload(driver, name) == [ModelUnloaded(model=name)]
    assert driver.engine.residents.families == {}
    assert driver.engine.residents.pool.ledger.resident_bytes() == 0


def test_founded_family_holds_the_same_words_as_the_rehomed_one(kinfolk: Kinfolk) -> None:
    rehomed = kinfolk.driver("base", "rows", "delta")
    unload(rehomed, "base", heir="rows")
    founded = kinfolk.driver("rows", "delta")
    for kind in ("rows", "delta"):
        one, other = (d.engine.residents.pool.get(kind).tensors for d in (rehomed, founded))
        assert one.keys() == other.keys()
        for name, entry in one.items():
            for a, b in zip(
                (*entry.tensors, *entry.base.tensors),
                (*other[name].tensors, *other[name].base.tensors),
                strict=True,
            ):
                assert torch.equal(a, b)
    assert resident_bytes(rehomed) == resident_bytes(founded)
    assert rehomed.snapshot().models == founded.snapshot().models


def test_donor_comes_back_as_an_alias_of_everything(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("base", "apart")
    unload(driver, "base", heir="apart")
    loaded = load(driver, kinfolk.message("mirror", donor="apart", model="base"))
    assert kinfolk.plans["mirror"].unique_bytes == 0
    # Nobody else leans on its words, so they are its own as long as that is so.
    assert loaded.bytes.unique == kinfolk.plans["base"].unique_bytes
    assert answer(driver, "base", PROMPT) == kinfolk.alone("base", PROMPT)
    load(driver, kinfolk.message("first", donor="apart"))
    assert driver.snapshot().models["base"].unique < loaded.bytes.unique


def test_prefixes_and_slots_survive_a_rehoming(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("base", "first", "second")
    prompt = [*PROMPT, *PROMPT, *PROMPT]
    family = driver.engine.residents.families["base"]
    want = answer(driver, "second", prompt)
    slots = {name: served.slot for name, served in driver.engine.residents.served.items()}
    unload(driver, "base", heir="first")
    assert driver.engine.residents.families == {"first": family}
    again = driver.submit("second", prompt, PARAMS)
    driver.run()
    assert said(driver, again) == want
    assert driver.outputs[again][0].num_cached_tokens == 20
    now = {name: served.slot for name, served in driver.engine.residents.served.items()}
    assert now == {name: slot for name, slot in slots.items() if name != "base"}


def test_heads_follow_each_other_while_all_are_busy(kinfolk: Kinfolk) -> None:
    names = ("base", "first", "delta", "rows")
    driver = kinfolk.driver(*names)
    running = {name: driver.submit(name, PROMPT, PARAMS) for name in names}
    driver.step()
    for head, heir in itertools.pairwise(names):
        driver.engine.handle(UnloadModel(model=head, heir=heir))
        driver.step()
        assert list(driver.engine.residents.families) == [heir]
    driver.run()
    for name, request_id in running.items():
        assert said(driver, request_id) == kinfolk.alone(name, PROMPT)
    assert list(driver.snapshot().models) == ["rows"]
    assert unload(driver, "rows") == [ModelUnloaded(model="rows")]
    assert driver.engine.residents.pool.ledger.resident_bytes() == 0
    assert driver.engine.residents.pool.budget.kv_bytes() == 0


def test_heir_whose_old_plan_still_runs_leaves_after_that(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("base", "first")
    residents = driver.engine.residents
    running = driver.submit("first", PROMPT, replace(PARAMS, max_tokens=100))
    driver.step()
    message = kinfolk.message("second", donor="base", model="first")
    driver.engine.handle(replace(message, replaces=True))
    while not residents.leaving():
        driver.step()
    driver.engine.handle(UnloadModel(model="base", heir="first"))
    driver.step()
    assert len(driver.tokens(running)) < 100
    assert residents.dependants("first") == []
    assert unload(driver, "first") == [ModelUnloaded(model="first")]
    assert len(driver.tokens(running)) == 100
    assert residents.families == {}
    assert residents.pool.ledger.resident_bytes() == residents.pool.budget.kv_bytes() == 0


def test_what_waits_for_a_donor_is_loaded_into_the_heirs_family(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("base", "first")
    slow_down(driver)
    driver.engine.handle(kinfolk.message("delta", donor="base"))
    driver.engine.handle(kinfolk.message("rows", donor="base"))
    driver.step()
    driver.step()
    assert driver.engine.residents.pool.budget.arriving_bytes()
    driver.engine.handle(UnloadModel(model="base", heir="first"))
    driver.step()
    assert "base" not in driver.engine.residents.served  # while one is loading and one waits
    driver.run()
    for name in ("first", "delta", "rows"):
        assert answer(driver, name, PROMPT) == kinfolk.alone(name, PROMPT)


def test_what_is_being_loaded_keeps_what_it_leans_on(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("base", "first", "rows")
    unload(driver, "base", heir="first")
    slow_down(driver)
    driver.engine.handle(replace(kinfolk.message("rows", donor="first", model="twin"), base=None))
    driver.step()
    driver.step()
    # Its twin is the only one that leans on the same tensors, and leaves meanwhile.
    unload_at = len(driver.events)
    driver.engine.handle(UnloadModel(model="rows"))
    driver.run()
    assert ModelUnloaded(model="rows") in driver.events[unload_at:]
    assert answer(driver, "twin", PROMPT) == kinfolk.alone("rows", PROMPT)


def test_cancelled_load_gives_back_what_it_read_of_the_base(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("base", "first")
    unload(driver, "base", heir="first")
    before, free = resident_bytes(driver), driver.engine.residents.pool.budget.free_bytes()
    for steps in (1, 3, 12, 30, 60):
        slow_down(driver)
        driver.engine.handle(kinfolk.message("delta", donor="first"))
        for _ in range(steps):
            driver.step()
        driver.engine.handle(UnloadModel(model="delta"))
        driver.run()
        assert resident_bytes(driver) == before
        assert driver.engine.residents.pool.budget.free_bytes() == free


@pytest.mark.parametrize("over_a_head", [True, False])
def test_base_that_changed_is_refused_and_leaves_nothing(
    kinfolk: Kinfolk, tmp_path: Path, *, over_a_head: bool
) -> None:
    shutil.copytree(kinfolk.base, tmp_path / "base")
    driver = Driver()
    if over_a_head:
        load(driver, kinfolk.message("apart"))
    message = load_message(
        "first",
        kinfolk.path("first"),
        donor="apart" if over_a_head else None,
        plan=kinfolk.plans["first"],
        base=tmp_path / "base",
    )
    before = driver.engine.residents.pool.budget.free_bytes()
    os.utime(tmp_path / "base" / "model.safetensors", ns=(1, 1))
    failed = driver.load(message)
    assert isinstance(failed, LoadFailed)
    assert failed.error["code"] == "bad_checkpoint"
    assert "planned against" in (failed.error["message"] or "")
    assert driver.engine.residents.pool.budget.free_bytes() == before
    shutil.rmtree(tmp_path / "base")
    failed = driver.load(message)
    assert isinstance(failed, LoadFailed)
    assert driver.engine.residents.pool.budget.free_bytes() == before
    assert list(driver.engine.residents.families) == (["apart"] if over_a_head else [])


def test_missing_base_tensors_count_against_the_budget(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("apart", config=replace(SMALL, memory_budget_bytes=10**9))
    pool = driver.engine.residents.pool
    needed = kinfolk.plans["mirror"].logical_bytes
    pool.budget.reserve("another", pool.budget.free_bytes() - needed + 1)
    failed = driver.load(kinfolk.message("mirror", donor="apart"))
    assert isinstance(failed, LoadFailed)
    assert failed.error["code"] == "insufficient_capacity"
    assert str(needed) in (failed.error["message"] or "")
    pool.budget.release("another")
    pool.budget.reserve("another", pool.budget.free_bytes() - needed)
    load(driver, kinfolk.message("mirror", donor="apart"))
    assert pool.budget.free_bytes() == 0


def test_heirs_that_cannot_take_the_place_are_refused(kinfolk: Kinfolk, tmp_path: Path) -> None:
    driver = kinfolk.driver("base", "first", "second", "delta")
    load(driver, load_message("stranger", make_checkpoint(tmp_path / "s", architecture="llama")))
    before = driver.snapshot()
    assert refusal(driver, "base", None).startswith("conflict: Model 'base' is the donor of first")
    assert refusal(driver, "base", "nobody").startswith("model_not_found")
    assert refusal(driver, "base", "base").startswith("conflict")
    assert refusal(driver, "base", "stranger").startswith("conflict")
    assert refusal(driver, "first", "second").startswith("conflict")
    assert driver.snapshot().models == before.models
    assert list(driver.engine.residents.families) == ["base", "stranger"]
    busy = driver.submit("second", PROMPT, PARAMS)
    driver.step()
    driver.engine.handle(UnloadModel(model="second"))  # on its way out
    assert refusal(driver, "base", "second").startswith("model_not_found")
    assert said(driver, busy) == kinfolk.alone("second", PROMPT)
    slow_down(driver)
    driver.engine.handle(replace(kinfolk.message("first", donor="base"), replaces=True))
    driver.step()
    assert "about to be replaced" in refusal(driver, "base", "first")
    assert answer(driver, "first", PROMPT) == kinfolk.alone("first", PROMPT)


def test_rehoming_twice_to_the_same_heir_is_once(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("base", "first", "second")
    running = driver.submit("base", PROMPT, PARAMS)
    driver.step()
    for heir in ("first", "first", "second", "first"):
        driver.engine.handle(UnloadModel(model="base", heir=heir))
    driver.run()
    failed = [event for event in driver.events if isinstance(event, UnloadFailed)]
    assert [event.error["code"] for event in failed] == ["conflict"]  # the other heir's
    assert said(driver, running) == kinfolk.alone("base", PROMPT)
    assert list(driver.engine.residents.families) == ["first"]


def test_head_that_took_over_is_neither_replaced_nor_pulled_away(kinfolk: Kinfolk) -> None:
    driver = kinfolk.driver("base", "first", "second")
    unload(driver, "base", heir="first")
    failed = driver.load(replace(kinfolk.message("first", donor="first"), replaces=True))
    assert isinstance(failed, LoadFailed)
    assert failed.error["code"] == "conflict"
    assert "donor of second." in refusal(driver, "first", None)
    failed = driver.load(kinfolk.message("delta", donor="second"))
    assert isinstance(failed, LoadFailed)
    assert "itself a variant of 'first'" in (failed.error["message"] or "")
