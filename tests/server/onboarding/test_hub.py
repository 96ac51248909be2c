"""The hub as the server meets it: workers that are started, shared, cancelled and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from linker_core.errors import (
    BadCheckpointError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
)
from server.onboarding.hub.hub import Hub
from server.onboarding.hub.limits import HubLimits
from server.onboarding.hub.listing import SourceKind
from server.onboarding.hub.source import HubSource
from server.onboarding.sources import Sources
from server.settings import HubSettings
from tests.server.onboarding import fake_hub
from tests.server.onboarding.hub_site import FILES, REPO, WEIGHTS, Site, site

MODEL = "model.safetensors"


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as found:
        yield found


def hub_of(there: Site, **settings: object) -> Hub:
    said = HubSettings(endpoint=there.hub.endpoint, keep_free_bytes=0, **settings)  # type: ignore[arg-type]
    return Hub(there.directory, said, retry_wait_s=0.001)


def ignore(_done_bytes: int, _total_bytes: int) -> None:
    pass


async def until(event: threading.Event) -> None:
    await asyncio.to_thread(event.wait)


async def held(there: Site, hub: Hub) -> asyncio.Task[Path]:
    """Returns a download that has come half way and stays there."""
    reached = threading.Event()
    there.hub.faults[MODEL] = [fake_hub.held_after(30_000, reached)]
    task = asyncio.ensure_future(hub.fetch(there.source, on_progress=ignore))
    await until(reached)
    return task


def workers() -> list[int]:
    """Returns the workers that this process has."""
    found = list[int]()
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            found += [int(child)] * (b"onboarding.hub.worker" in command)
    return found


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


def test_source_is_looked_up_downloaded_and_found_again(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there)
        progress = list[tuple[int, int]]()
        offer = await hub.look(HubSource.parse(f"hub:{REPO}"))
        assert (offer.source, offer.kind, offer.path) == (there.source, SourceKind.CHECKPOINT, None)
        assert await hub.locate(offer.source) is None
        path = await hub.fetch(offer.source, on_progress=lambda *said: progress.append(said))
        total = sum(map(len, FILES.values()))
        assert progress[-1] == (total, total)
        assert [done for done, _ in progress] == sorted(done for done, _ in progress)
        asked = len(there.hub.asked)
        later = hub_of(there)  # the next start's
        assert await later.locate(offer.source) == path
        assert (await later.look(offer.source)).path == path
        assert await later.fetch(offer.source, on_progress=ignore) == path
        assert len(there.hub.asked) == asked

    run(scenario)


def test_errors_of_the_worker_arrive_as_they_are(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there)
        with pytest.raises(InvalidRequestError, match="no revision v9"):
            await hub.look(HubSource.parse(f"hub:{REPO}@v9"))
        there.hub.faults[MODEL] = [fake_hub.zeros]
        with pytest.raises(BadCheckpointError, match="digest"):
            await hub.fetch(there.source, on_progress=ignore)
        assert await hub.fetch(there.source, on_progress=ignore)  # the hub came to its senses

    run(scenario)


def test_token_of_the_environment_is_shown(there: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        there.hub.token = "hf_secret"
        hub = hub_of(there)
        with pytest.raises(InvalidRequestError, match="HF_TOKEN"):
            await hub.look(there.source)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert (await hub.look(there.source)).source == there.source

    run(scenario)


def test_b6_same_source_is_downloaded_once_for_all(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there)
        paths = await asyncio.gather(
            *(hub.fetch(there.source, on_progress=ignore) for _ in range(5))
        )
        assert len(set(paths)) == 1
        assert len(there.hub.asked_for(MODEL)) == 1

    run(scenario)


def test_cancelled_download_ends_its_worker_and_is_resumed(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there)
        task = await held(there, hub)
        assert len(workers()) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert workers() == []
        assert there.part().stat().st_size <= len(WEIGHTS)
        assert (await hub.fetch(there.source, on_progress=ignore) / MODEL).read_bytes() == WEIGHTS

    run(scenario)


def test_cancelled_waiter_does_not_end_the_download_of_others(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there)
        first = await held(there, hub)
        second = asyncio.ensure_future(hub.fetch(there.source, on_progress=ignore))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert len(workers()) == 1
        there.hub.released.set()  # the connection ends; the rest is asked for again
        assert (await second / MODEL).read_bytes() == WEIGHTS

    run(scenario)


def test_fetch_right_after_a_cancel_waits_for_the_old_worker(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there)
        first = await held(there, hub)
        first.cancel()
        await asyncio.sleep(0)  # it is on its way out
        assert (await hub.fetch(there.source, on_progress=ignore) / MODEL).read_bytes() == WEIGHTS
        with pytest.raises(asyncio.CancelledError):
            await first

    run(scenario)


def test_b8_killed_worker_leaves_a_part_that_the_next_one_takes_up(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there)
        task = await held(there, hub)
        while not there.part().exists() or there.part().stat().st_size < 30_000:
            await asyncio.sleep(0.01)
        (worker,) = workers()
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(Exception, match="killed"):
            await task
        assert await hub.locate(there.source) is None
        assert (await hub.fetch(there.source, on_progress=ignore) / MODEL).read_bytes() == WEIGHTS
        assert there.hub.asked_for(MODEL)[-1].range == "bytes=30000-"
        assert not any("unfinished" in file for file in there.files())

    run(scenario)


def test_sweep_spares_what_runs_and_what_is_held(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there)
        task = await held(there, hub)
        await hub.sweep(list)
        assert there.part().exists()
        there.hub.released.set()
        await task
        with hub.held(there.source):
            await hub.sweep(list)
            assert await hub.locate(there.source) is not None
        await hub.sweep(lambda: [str(there.source), "/models/local"])
        assert await hub.locate(there.source) is not None
        await hub.sweep(lambda: ["/models/local"])
        assert await hub.locate(there.source) is None
        assert there.files() == set()

    run(scenario)


def test_row_that_comes_while_a_sweep_waits_counts(there: Site) -> None:
    async def scenario() -> None:
        hub, rows = hub_of(there), list[str]()
        path = await hub.fetch(there.source, on_progress=ignore)

        async def submit() -> None:
            assert (await hub.look(there.source)).path == path
            rows.append(str(there.source))

        submitting = asyncio.ensure_future(submit())
        await asyncio.sleep(0)  # it has the cache now
        sweeping = asyncio.ensure_future(hub.sweep(lambda: rows))
        await submitting
        await sweeping
        assert await hub.locate(there.source) == path

    run(scenario)


def test_part_of_a_cancelled_download_goes_with_its_row(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there)
        task = await held(there, hub)
        task.cancel()
        await asyncio.wait([task])
        await hub.sweep(lambda: [str(there.source)])
        assert there.files() != set()
        await hub.sweep(list)
        assert there.files() == set()

    run(scenario)


def test_downloads_at_once_are_bounded(there: Site) -> None:
    async def scenario() -> None:
        hub = hub_of(there, downloads=1)
        there.hub.add("acme/other", {**FILES, MODEL: WEIGHTS[::-1]})
        other = there.at_commit("acme/other")
        task = await held(there, hub)
        waiting = asyncio.ensure_future(hub.fetch(other, on_progress=ignore))
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert len(workers()) == 1
        there.hub.released.set()
        assert await task != await waiting

    run(scenario)


def test_b6_looks_are_bounded(there: Site) -> None:
    async def scenario() -> None:
        reached = threading.Event()
        there.hub.api_fault = fake_hub.held_after(0, reached)
        hub = hub_of(there)
        asking = [asyncio.ensure_future(hub.look(there.source)) for _ in range(32)]
        await until(reached)
        assert len(workers()) <= 4
        with pytest.raises(QueueFullError):
            await hub.look(there.source)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        assert workers() == []
        there.hub.api_fault = None
        assert (await hub.look(there.source)).source == there.source

    run(scenario)


def test_branch_of_a_kept_source_is_remembered(there: Site) -> None:
    async def scenario() -> None:
        branch = HubSource.parse(f"hub:{REPO}@main")
        hub = hub_of(there)
        assert await hub.remembered(branch) == []
        await hub.look(branch)
        before = there.source
        there.hub.add(REPO, FILES, seed="README")
        await hub.look(branch)
        assert await hub.remembered(branch) == [before, there.source]
        assert await hub_of(there).remembered(branch) == [before, there.source]
        assert await hub.remembered(before) == [before]
        await hub.sweep(lambda: [str(before)])
        assert await hub.remembered(branch) == [before]
        await hub.sweep(list)
        assert await hub.remembered(branch) == []

    run(scenario)


# --- sources ----------------------------------------------------------------------------------


def test_missing_download_of_a_stored_model_is_begun_again(there: Site) -> None:
    async def scenario() -> None:
        sources = Sources([], hub_of(there))
        arrived = asyncio.Event()
        sources.on_arrived = arrived.set
        for _ in range(2):  # asked for twice, begun once
            with pytest.raises(NotReadyError, match="downloaded again"):
                await sources.read(str(there.source))
        await arrived.wait()
        assert len(there.hub.asked_for(MODEL)) == 1
        with pytest.raises(BadCheckpointError):  # it is here; its weights are none
            await sources.read(str(there.source))

    run(scenario)


def test_missing_download_that_fails_is_begun_again_when_asked(
    there: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        sources = Sources([], hub_of(there))
        there.hub.faults[MODEL] = [fake_hub.status(404)]
        with pytest.raises(NotReadyError):
            await sources.read(str(there.source))
        while "cannot be downloaded again" not in caplog.text:
            await asyncio.sleep(0.01)
        arrived = asyncio.Event()
        sources.on_arrived = arrived.set
        with pytest.raises(NotReadyError):
            await sources.read(str(there.source))
        await arrived.wait()

    run(scenario)


def test_closing_ends_what_was_begun_again(there: Site) -> None:
    async def scenario() -> None:
        reached = threading.Event()
        there.hub.faults[MODEL] = [fake_hub.held_after(30_000, reached)]
        sources = Sources([], hub_of(there))
        with pytest.raises(NotReadyError):
            await sources.read(str(there.source))
        await until(reached)
        await sources.close()
        assert workers() == []

    run(scenario)


def test_sources_are_found_as_rows_have_them(there: Site, tmp_path: Path) -> None:
    async def scenario() -> None:
        sources = Sources([tmp_path], hub_of(there))
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").touch()
        (tmp_path / "delta").mkdir()
        (tmp_path / "delta" / "delta.safetensors").touch()
        assert await sources.find("adapter") == (
            str(tmp_path / "adapter"), SourceKind.ADAPTER, tmp_path / "adapter"
        )  # fmt: skip
        assert (await sources.find(str(tmp_path / "delta"))).kind is SourceKind.DELTA
        assert await sources.find(f"hub:{REPO}@main") == (
            str(there.source),
            SourceKind.CHECKPOINT,
            None,
        )
        path = await sources.path(str(there.source), on_progress=ignore)
        assert await sources.find(f"hub:{REPO}@main") == (
            str(there.source),
            SourceKind.CHECKPOINT,
            path,
        )
        assert await sources.kept(f"hub:{REPO}@main") == [str(there.source)]
        assert await sources.kept("/models/x") == ["/models/x"]

    run(scenario)


@pytest.mark.parametrize(
    "source",
    [
        "hub:",
        "hub:base",
        "hub:/base",
        "hub:acme/",
        "hub:acme/base/x",
        "hub:../base",
        "hub:acme/..",
        "hub:acme/a..b",
        "hub:acme/a--b",
        "hub:acme/base.git",
        "hub:-acme/base",
        "hub:acme/base@",
        "hub:acme/base@../../etc",
        "hub:acme/base@a b",
        "hub:acme/base@a?b",
        "hub:acme/base@a\nb",
        "hub:acme/base\n",
        "hub:acmé/base",
        "hub:https://evil.example/acme/base",
        "hub:evil.example:80/x",
        "hub://acme/base",
        "hub:" + "a" * 97 + "/base",
        "hub:acme/base@" + "a" * 129,
    ],
)
def test_b3_what_is_no_name_on_the_hub_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        HubSource.parse(source)
    assert caught.value.param == "source"


@pytest.mark.parametrize(
    ("source", "repo", "revision"),
    [
        ("hub:acme/base", "acme/base", "main"),
        ("hub:a/b@v1.0", "a/b", "v1.0"),
        ("hub:Acme_1/b.c-d@refs/pr/3", "Acme_1/b.c-d", "refs/pr/3"),
    ],
)
def test_names_on_the_hub_are_read(source: str, repo: str, revision: str) -> None:
    assert HubSource.parse(source) == HubSource(repo=repo, revision=revision)


@pytest.mark.parametrize(
    "settings",
    [
        {"endpoint": "hub.example"},
        {"endpoint": "ftp://hub.example"},
        {"endpoint": "https://hub.example:port"},
        {"endpoint": "https://[::1"},
        {"endpoint": "https://:443"},
        {"endpoint": "https://user:word@hub.example"},
        {"endpoint": "https://hub.example/?a=b"},
        {"endpoint": "https://hub.example#a"},
        {"stores": ["https://store.example"]},
        {"stores": [".example"]},
        {"stores": ["store.example:80"]},
        {"downloads": 0},
        {"keep_free_bytes": -1},
    ],
)
def test_settings_that_are_none_of_a_hub_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HubSettings.model_validate(settings)


def test_stores_follow_from_the_endpoint_unless_they_are_named() -> None:
    def limits(**said: object) -> HubLimits:
        return HubLimits.of(HubSettings.model_validate(said), retry_wait_s=1)

    public = limits()
    assert public.endpoint == "https://huggingface.co"
    assert (public.is_public, public.are_stores_public) == (True, True)
    assert public.stores == ("hf.co", "huggingface.co")
    assert limits(endpoint="https://huggingface.co/").stores == public.stores
    assert limits(endpoint="http://[::1]:80/hub").stores == ()
    named = limits(endpoint="https://hub.example", stores=["store.example"])
    assert (named.is_public, named.are_stores_public) == (False, False)
    assert HubLimits.from_json(named.to_json()) == named
