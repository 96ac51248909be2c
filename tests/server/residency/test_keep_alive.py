"""How long models are kept that nobody asks for."""

from __future__ import annotations

import asyncio

from server.metrics.evictions import EvictionReason
from server.registry.records import ModelState
from server.residency.keep_alive import KeepAlive
from tests.server.residency.fakes import Device, in_loop, settle


def device(default_s: float | None) -> tuple[Device, KeepAlive]:
    """A donor and a variant of it, used just now, and who watches them."""
    made = Device(1000)
    made.put("base", 100)
    made.put("near", 50, donor="base")
    keep_alive = KeepAlive(
        catalog=made.catalog, rows=made.rows, evictions=made.evictions, default_s=default_s
    )
    return made, keep_alive


@in_loop
async def test_models_leave_after_their_time_variants_before_donors() -> None:
    on, keep_alive = device(60)
    on.now += 59
    await keep_alive.look()
    assert on.client.unloaded == []
    on.now += 1
    await keep_alive.look()
    assert on.client.unloaded == ["near", "base"]
    assert on.evicted(EvictionReason.IDLE) == 2


@in_loop
async def test_for_ever_is_for_ever() -> None:
    on, keep_alive = device(None)
    on.now += 1e9
    await keep_alive.look()
    assert on.client.unloaded == []


@in_loop
async def test_a_models_own_time_wins_over_the_settings() -> None:
    on, keep_alive = device(None)
    on.rows.amend("near", keep_alive_s=10)
    on.now += 10
    await keep_alive.look()
    assert on.client.unloaded == ["near"]
    on, keep_alive = device(5)
    on.rows.amend("near", keep_alive_s=10)
    on.now += 9
    await keep_alive.look()
    assert on.client.unloaded == []  # the donor's time is over, and `near` leans on it


@in_loop
async def test_zero_leaves_after_the_last_request() -> None:
    on, keep_alive = device(None)
    on.rows.amend("near", keep_alive_s=0)
    with on.catalog.lease("near"), on.catalog.lease("near"):
        await keep_alive.look()
        assert on.client.unloaded == []
    await keep_alive.look()
    assert on.client.unloaded == ["near"]


@in_loop
async def test_idle_time_begins_with_the_end_of_the_last_request() -> None:
    on, keep_alive = device(60)
    with on.catalog.lease("near"):
        on.now += 100
    on.now += 59
    await keep_alive.look()
    assert on.client.unloaded == []


@in_loop
async def test_pinned_models_stay() -> None:
    on, keep_alive = device(60)
    on.rows.amend("near", pinned=True)
    on.now += 100
    await keep_alive.look()
    assert on.client.unloaded == []


@in_loop
async def test_an_engine_that_dies_does_not_end_the_watch() -> None:
    on, keep_alive = device(60)
    on.now += 100
    on.client.go_on.clear()
    looking = asyncio.ensure_future(keep_alive.look())
    await settle()
    on.client.die()
    await looking
    assert on.state("near") is ModelState.READY
