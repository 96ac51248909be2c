"""The way out: what waits, what is undone, what goes on."""

from __future__ import annotations

import asyncio

import pytest

from linker_core.errors import ConflictError, EngineFailureError, ModelNotFoundError, NotReadyError
from server.metrics.evictions import EvictionReason
from server.registry.records import ModelState
from tests.server.residency.fakes import Device, in_loop, settle


def device() -> Device:
    """A device with a donor and a variant of it."""
    made = Device(1000)
    made.put("base", 100)
    made.put("near", 50, donor="base")
    return made


@in_loop
async def test_unload_frees_the_bytes_and_leaves_a_servable_row() -> None:
    on = device()
    before = on.client.free_bytes
    await on.evictions.unload("near")
    assert on.client.free_bytes == before + 50
    assert on.state("near") is ModelState.UNLOADED
    assert on.rows.num_writes == 1
    assert on.evicted(EvictionReason.REQUEST) == 1
    await on.evictions.unload("near")  # as it is already
    assert on.client.unloaded == ["near"]


@in_loop
async def test_unload_takes_pinned_models_too_and_keeps_the_pin() -> None:
    on = device()
    on.rows.amend("near", pinned=True)
    await on.evictions.unload("near")
    assert on.rows.records["near"].pinned
    assert on.state("near") is ModelState.UNLOADED


@in_loop
async def test_unload_succeeds_while_the_registry_is_locked() -> None:
    on = device()
    on.rows.locked = True
    await on.evictions.unload("near")
    assert on.state("near") is ModelState.UNLOADED


@in_loop
async def test_unload_of_a_donor_names_the_resident_models_that_lean_on_it() -> None:
    on = device()
    with pytest.raises(ConflictError, match="near"):
        await on.evictions.unload("base")
    assert on.catalog.get("base") is not None
    assert not on.catalog.turn("base").wanted
    await on.evictions.unload("near")
    await on.evictions.unload("base")
    assert on.client.held == {}


@in_loop
async def test_unload_refuses_what_is_not_there() -> None:
    on = device()
    with pytest.raises(ModelNotFoundError):
        await on.evictions.unload("nobody")
    for state, error in (
        (ModelState.READY, NotReadyError),
        (ModelState.FAILED, ConflictError),
        (ModelState.ONBOARDING, ConflictError),
    ):
        on.know("absent", state=state)
        with pytest.raises(error):
            await on.evictions.unload("absent")
        assert not on.catalog.turn("absent").wanted


@in_loop
async def test_unload_refuses_a_model_that_is_about_to_be_stored_as_ready() -> None:
    on = device()
    on.rows.amend("near", state=ModelState.ONBOARDING)
    with pytest.raises(ConflictError, match="being onboarded"):
        await on.evictions.unload("near")
    assert on.catalog.get("near") is not None
    assert not on.catalog.turn("near").wanted


@in_loop
async def test_unload_lets_running_requests_end_and_closes_the_model_to_others() -> None:
    on = device()
    with on.catalog.lease("near"):
        unloading = asyncio.ensure_future(on.evictions.unload("near"))
        await settle()
        assert on.catalog.get("near") is None
        assert on.client.unloaded == []
        assert on.evictions.is_leaving("near")
    await unloading
    assert on.client.unloaded == ["near"]
    assert not on.evictions.is_leaving("near")


@in_loop
async def test_a_wait_that_is_cancelled_cancels_no_unloading() -> None:
    on = device()
    with on.catalog.lease("near"):
        unloading = asyncio.ensure_future(on.evictions.unload("near"))
        await settle()
        unloading.cancel()
        await settle()
        assert unloading.cancelled()
    await settle()
    assert on.client.unloaded == ["near"]
    assert on.state("near") is ModelState.UNLOADED
    assert not on.catalog.turn("near").wanted


@in_loop
async def test_what_the_engine_keeps_is_open_to_requests_again() -> None:
    on = device()
    on.catalog.park("near")  # the engine still has it, so it refuses to let the donor go
    with pytest.raises(ConflictError):
        await on.evictions.unload("base")
    assert on.catalog.get("base") is not None
    assert on.state("base") is ModelState.READY


@in_loop
async def test_an_engine_that_dies_meanwhile_leaves_the_row_as_it_was() -> None:
    on = device()
    on.client.go_on.clear()
    unloading = asyncio.ensure_future(on.evictions.unload("near"))
    await settle()
    on.client.die()
    with pytest.raises(EngineFailureError):
        await unloading
    assert on.state("near") is ModelState.READY
    assert not on.catalog.turn("near").wanted


@in_loop
async def test_only_what_nobody_needs_is_evicted_for_room_or_idleness() -> None:
    on = device()
    idle = EvictionReason.IDLE
    assert not await on.evictions.evict_idle("base", idle)  # `near` leans on it
    with on.catalog.lease("near"):
        assert not await on.evictions.evict_idle("near", idle)
    async with on.catalog.turn("near"):
        assert not await on.evictions.evict_idle("near", idle)
    on.rows.amend("near", pinned=True)
    assert not await on.evictions.evict_idle("near", idle)
    on.rows.amend("near", pinned=False, state=ModelState.ONBOARDING)  # about to be stored as ready
    assert not await on.evictions.evict_idle("near", idle)
    on.rows.amend("near", state=ModelState.READY)
    assert not await on.evictions.evict_idle("nobody", idle)
    assert on.client.unloaded == []
    assert await on.evictions.evict_idle("near", idle)
    assert on.evicted(idle) == 1


@in_loop
async def test_a_deleted_model_leaves_no_row_behind() -> None:
    on = device()
    on.client.go_on.clear()
    evicting = asyncio.ensure_future(on.evictions.evict_idle("near", EvictionReason.IDLE))
    await settle()
    del on.rows.records["near"]
    on.catalog.retract("near")
    on.client.go_on.set()
    assert await evicting
    assert "near" not in on.rows.records
    assert on.catalog.dormant("near") is None


@in_loop
async def test_stop_ends_what_would_wait_for_requests() -> None:
    on = device()
    with on.catalog.lease("near"):
        unloading = asyncio.ensure_future(on.evictions.unload("near"))
        await settle()
        await on.evictions.stop()
        with pytest.raises(asyncio.CancelledError):
            await unloading
    assert not on.catalog.turn("near").wanted
