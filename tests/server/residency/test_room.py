"""Room on a device that counts: who leaves, who waits, and what refusals say."""

from __future__ import annotations

import asyncio

import pytest

from linker_core.errors import EngineFailureError, InsufficientCapacityError
from server.metrics.evictions import EvictionReason
from server.registry.records import ModelState
from tests.server.residency.fakes import KV_BYTES, Device, in_loop, settle

# A donor of 100 and its cache of 50; what is left is for variants.
BUDGET = 1000


def device() -> Device:
    """A device with the donor `base`, and the variants `old`, `big` and `new` of it."""
    made = Device(BUDGET)
    made.put("base", 100, pinned=True)
    made.put("old", 100, donor="base", idle_s=500)  # 50,000 byte seconds
    made.put("big", 400, donor="base", idle_s=100)  # 40,000
    made.put("new", 200, donor="base", idle_s=1)  # 200
    assert made.client.free_bytes == 150
    return made


async def take(on: Device, nbytes: int, *, keep: frozenset[str] = frozenset()) -> int:
    """Takes room and returns what is free then."""
    async with on.room.taking(nbytes, what="It", keep=keep):
        return on.client.free_bytes


@in_loop
async def test_what_fits_evicts_nobody() -> None:
    on = device()
    assert await take(on, 150) == 150
    assert on.client.unloaded == []


@in_loop
async def test_room_is_made_by_bytes_times_idle_time() -> None:
    on = device()
    assert await take(on, 250) == 250
    assert on.client.unloaded == ["old"]
    assert on.state("old") is ModelState.UNLOADED
    assert on.catalog.get("old") is None
    assert on.catalog.dormant("old") is not None
    assert on.evicted(EvictionReason.CAPACITY) == 1


@in_loop
async def test_nobody_leaves_in_vain() -> None:
    on = device()
    # `old` would be asked first, but `big`, who has to leave anyhow, gives enough.
    assert await take(on, 550) == 550
    assert on.client.unloaded == ["big"]


@in_loop
async def test_pinned_kept_and_used_models_stay() -> None:
    on = device()
    on.rows.amend("old", pinned=True)
    with on.catalog.lease("big"):
        assert await take(on, 350) == 350
        assert on.client.unloaded == ["new"]
    on = device()
    assert await take(on, 250, keep=frozenset({"old"})) == 550
    assert on.client.unloaded == ["big"]


@in_loop
async def test_what_can_never_fit_is_refused_with_all_figures_and_evicts_nobody() -> None:
    on = device()
    with pytest.raises(InsufficientCapacityError) as refusal:
        await take(on, 851)
    assert "needs 851 bytes" in refusal.value.message
    assert "150 are free" in refusal.value.message
    assert "would give 700" in refusal.value.message
    assert refusal.value.retry_after_s is None
    assert on.client.unloaded == []
    assert on.room.would_evict(851) is None
    with pytest.raises(InsufficientCapacityError):
        on.room.check(851, what="It")


@in_loop
async def test_what_only_running_requests_prevent_says_when_to_try_again() -> None:
    on = device()
    with on.catalog.lease("big"):
        with pytest.raises(InsufficientCapacityError) as refusal:
            await take(on, 851 - 100)
        assert refusal.value.retry_after_s is not None
        assert "400 more are in use" in refusal.value.message
        on.room.check(850, what="It")  # once the request has ended
        with pytest.raises(InsufficientCapacityError):
            on.room.check(851, what="It")
    assert on.client.unloaded == []
    assert await take(on, 850) == 850


@in_loop
async def test_a_reservation_in_the_way_passes() -> None:
    on = device()
    async with on.room.reserving(on.engine(), "tuner", 150, what="Measuring"):
        with pytest.raises(InsufficientCapacityError) as refusal:
            await take(on, 850)
        assert refusal.value.retry_after_s is not None
        on.client.reports = False  # the engine's next report comes later
    assert await take(on, 150) == 150
    assert on.client.unloaded == []


@in_loop
async def test_a_reservation_makes_room_for_itself() -> None:
    on = device()
    async with on.room.reserving(on.engine(), "tuner", 250, what="Measuring"):
        assert on.client.unloaded == ["old"]
        assert on.client.reservations == {"tuner": 250}
    assert on.client.reservations == {}


@in_loop
async def test_a_donor_leaves_after_all_that_lean_on_it_and_gives_its_cache_back() -> None:
    on = device()
    on.rows.amend("base", pinned=False)
    assert on.room.would_evict(850) == ["old", "big", "new"]
    needed = 850 + 100 + KV_BYTES
    assert await take(on, needed) == needed
    assert on.client.unloaded == ["old", "big", "new", "base"]
    assert on.client.free_bytes == BUDGET


@in_loop
async def test_a_donor_of_a_used_variant_stays() -> None:
    on = device()
    on.rows.amend("base", pinned=False)
    with on.catalog.lease("new"):
        assert on.room.would_evict(651) is None
        assert await take(on, 650) == 650
    assert sorted(on.client.unloaded) == ["big", "old"]


@in_loop
async def test_of_two_families_only_one_leaves_where_that_is_enough() -> None:
    on = Device(BUDGET)
    on.put("a", 300, idle_s=10)
    on.put("a1", 50, donor="a", idle_s=10)
    on.put("b", 300, idle_s=1)
    on.put("b1", 50, donor="b", idle_s=1)
    # The variants alone give 100 and 200 are free; one donor more is enough.
    assert on.room.would_evict(500) == ["a1", "a"]
    assert await take(on, 500) >= 500
    assert on.client.unloaded == ["a1", "a"]
    assert on.catalog.get("b") is not None


@in_loop
async def test_what_was_predicted_too_low_evicts_the_next_and_tries_again() -> None:
    on = device()
    attempts = []

    async def work() -> str:
        attempts.append(on.client.free_bytes)
        if on.client.free_bytes < 250:
            raise InsufficientCapacityError("The engine knows better.")
        return "done"

    assert await on.room.fit(150, work, what="It") == "done"
    assert attempts == [150, 250]
    assert on.client.unloaded == ["old"]


@in_loop
async def test_an_engine_that_always_refuses_empties_no_device() -> None:
    on = device()

    async def work() -> None:
        raise InsufficientCapacityError("Too big whatever there is.")

    with pytest.raises(InsufficientCapacityError, match="Too big"):
        await on.room.fit(75, work, what="It")
    assert on.client.unloaded == []  # twice as much as it says it needs is free
    with pytest.raises(InsufficientCapacityError, match="Too big"):
        await on.room.fit(150, work, what="It")
    assert on.client.unloaded == ["old", "big"]


@in_loop
async def test_who_may_not_evict_is_refused() -> None:
    on = device()
    with pytest.raises(InsufficientCapacityError) as refusal:
        async with on.room.taking(151, what="It", may_evict=False):
            pass
    assert on.client.unloaded == []
    # Nothing that runs is in the way, so nothing comes of trying again.
    assert refusal.value.retry_after_s is None
    assert "no model leaves for it" in refusal.value.message
    assert "more are in use" not in refusal.value.message


@in_loop
async def test_who_may_not_evict_waits_for_a_reservation() -> None:
    on = device()
    async with on.room.reserving(on.engine(), "tuner", 100, what="Measuring"):
        with pytest.raises(InsufficientCapacityError, match="100 more are in use") as refusal:
            async with on.room.taking(150, what="It", may_evict=False):
                pass
        assert refusal.value.retry_after_s is not None


@in_loop
async def test_a_model_that_the_engine_still_needs_is_in_the_way_only_for_now() -> None:
    on = Device(BUDGET)
    on.put("base", 100)
    on.client.donors["gone"] = "base"  # a variant on its way out, of which no row speaks
    with pytest.raises(InsufficientCapacityError, match="150 more are in use") as refusal:
        await take(on, BUDGET)
    assert refusal.value.retry_after_s is not None
    del on.client.donors["gone"]
    assert await take(on, BUDGET) == BUDGET


@in_loop
async def test_only_a_model_that_founds_a_family_is_advised_to_join_one() -> None:
    on = device()
    for founds in (True, False):
        with pytest.raises(InsufficientCapacityError, match="raise the memory budget") as refusal:
            async with on.room.taking(851, what="It", founds=founds):
                pass
        assert ("as a variant of a donor" in refusal.value.message) is founds
    with pytest.raises(InsufficientCapacityError, match="as a variant of a donor"):
        on.room.check(851, what="It")
    with pytest.raises(InsufficientCapacityError) as refusal:
        on.room.check(851, what="It", keep=frozenset({"base"}))
    assert "as a variant of a donor" not in refusal.value.message


@in_loop
async def test_two_who_take_come_one_after_the_other_and_never_share_bytes() -> None:
    on = device()
    order = []

    async def load(name: str) -> None:
        async with on.room.taking(150, what=name):
            order.append(f"{name} begins")
            await settle()
            on.client.load(name, 150, "base")
            order.append(f"{name} ends")

    await asyncio.gather(load("one"), load("two"))
    assert order == ["one begins", "one ends", "two begins", "two ends"]
    assert on.client.unloaded == ["big"]  # 150 bytes for `two`: `old` has but 100


@in_loop
async def test_a_taker_that_leaves_during_an_eviction_makes_nobody_evict_twice() -> None:
    on = device()
    on.client.go_on.clear()
    first = asyncio.ensure_future(take(on, 250))
    await settle()
    first.cancel()
    second = asyncio.ensure_future(take(on, 250))
    await settle()
    on.client.go_on.set()
    assert await second == 250
    assert first.cancelled()
    assert on.client.unloaded == ["old"]


@in_loop
async def test_the_engines_death_during_an_eviction_frees_the_way_and_keeps_the_row() -> None:
    on = device()
    on.client.go_on.clear()
    taker = asyncio.ensure_future(take(on, 250))
    await settle()
    on.client.die()
    with pytest.raises(EngineFailureError):
        await taker
    assert on.state("old") is ModelState.READY  # the next engine gets it
    assert not on.catalog.turn("old").wanted
    assert on.evicted(EvictionReason.CAPACITY) == 0


@in_loop
async def test_a_model_whose_turn_passes_on_is_not_waited_for() -> None:
    """The next holder of a turn may wait for room: waiting for it would be for ever."""
    on = device()
    turn = on.catalog.turn("old")
    await turn.acquire()

    async def load_with_turn() -> int:
        async with turn:
            return await take(on, 450)

    holder = asyncio.ensure_future(load_with_turn())
    await settle()
    turn.release()  # unlocked, and not free: the holder has yet to wake up
    assert not turn.locked()
    assert await take(on, 250) == 550
    assert on.client.unloaded == ["big"]
    assert await holder == 550


@in_loop
async def test_models_that_come_to_be_used_while_others_leave_stay() -> None:
    on = device()
    on.client.go_on.clear()
    taker = asyncio.ensure_future(take(on, 650))  # `old` and `big`
    await settle()
    with on.catalog.lease("big"):  # a request, while `old` is leaving
        on.client.go_on.set()
        with pytest.raises(InsufficientCapacityError) as refusal:
            await taker
    assert refusal.value.retry_after_s is not None
    assert on.catalog.get("big") is not None


@in_loop
async def test_who_is_closed_is_in_use_longest_and_one_at_a_time() -> None:
    on = device()
    with on.catalog.lease("big"), on.catalog.lease("new"):
        on.now += 10
        closing = asyncio.ensure_future(on.room.close_one(keep=frozenset({"base"})))
        await settle()
        assert on.catalog.get("big") is None  # 400 bytes for 110 s against 200 for 11
        await on.room.close_one(keep=frozenset())
        assert on.catalog.get("new") is not None
        assert not closing.done()
    await closing
    assert on.client.unloaded == ["big"]


@in_loop
async def test_nobody_is_closed_who_is_pinned_idle_or_leaned_on() -> None:
    on = device()
    on.rows.amend("big", pinned=True)
    with on.catalog.lease("big"), on.catalog.lease("base"):
        await on.room.close_one(keep=frozenset())
    assert on.client.unloaded == []


@in_loop
async def test_a_donor_that_the_engine_still_needs_is_passed_over() -> None:
    on = device()
    on.rows.amend("base", pinned=False)
    on.catalog.retract("new")  # deleted, and still in the engine for its last requests
    with pytest.raises(InsufficientCapacityError) as refusal:
        await take(on, 700)
    assert refusal.value.retry_after_s is not None
    assert on.catalog.get("base") is not None
