from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import InvalidRequestError, LinkerError, NotReadyError, QueueFullError
from linker_core.text.template_frames import TEMPLATE_COMMAND
from linker_core.text.template_source import TemplateSource, template_variables
from server.rendering.templates import RenderLimits, Templates
from tests.server.rendering.worker import command
from tests.templates import compiled, rendered
from tests.tiny import CHATML

HELLO = [{"role": "user", "content": "Hello, 世界! 🌍"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(40) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}"
)
MINE, THEIRS = TemplateSource.of("mine"), TemplateSource.of("theirs")
# Nothing here depends on how fast this machine is.
PATIENT = RenderLimits(cpu_s=60.0, wall_s=120.0, wait_s=240.0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


@asynccontextmanager
async def pool(
    workers: Sequence[str] = TEMPLATE_COMMAND, limits: RenderLimits = PATIENT, number: int = 2
) -> AsyncIterator[Templates]:
    templates = Templates(num_workers=number, command=workers, limits=limits)
    try:
        yield templates
    finally:
        await templates.close()


def asked(content: str = "hi") -> dict[str, object]:
    return template_variables(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        bos_token=None,
        eos_token=None,
    )


def wish(what: str) -> dict[str, object]:
    return {"do": what}


async def refused(rendering: Awaitable[str]) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        await rendering
    assert caught.value.param == "messages"
    return caught.value.message


def test_text_is_that_of_the_template() -> None:
    async def test() -> None:
        variables = template_variables(
            HELLO, add_generation_prompt=True, bos_token="<s>", eos_token=None
        )
        async with pool() as templates:
            text = await templates.render(TemplateSource.of(CHATML + "{{ bos_token }}"), variables)
        assert text == rendered(compiled(CHATML + "{{ bos_token }}"), HELLO, bos="<s>")

    run(test)


def test_texts_at_once_are_everyones_own() -> None:
    async def test() -> None:
        sources = [TemplateSource.of(f"{n} {{{{ messages[0].content }}}}") for n in range(40)]
        async with pool(number=4) as templates:
            texts = await asyncio.gather(
                *(templates.render(s, asked(str(n * n))) for n, s in enumerate(sources * 5))
            )
        assert texts == [f"{n % 40} {n * n}" for n in range(200)]

    run(test)


def test_large_dialogue_arrives_whole() -> None:
    async def test() -> None:
        content = "ä🌍" * 400_000
        async with pool() as templates:
            source = TemplateSource.of("{{ messages[0].content }}")
            assert await templates.render(source, asked(content)) == content

    run(test)


def test_template_that_comes_to_no_end_is_stopped_while_others_go_on() -> None:
    async def test() -> None:
        limits = RenderLimits(wall_s=120.0, wait_s=240.0)
        async with pool(limits=limits) as templates:
            endless = [
                asyncio.ensure_future(templates.render(TemplateSource.of(ENDLESS), asked()))
                for _ in range(3)
            ]
            source = TemplateSource.of(CHATML)
            for _ in range(20):
                await templates.render(source, asked())
            for one in endless:
                assert "too long" in await refused(one)

    run(test)


def test_template_that_takes_all_memory_is_refused_and_others_go_on() -> None:
    async def test() -> None:
        async with pool() as templates:
            assert "memory" in await refused(templates.render(TemplateSource.of(DOUBLING), asked()))
            assert "hi" in await templates.render(TemplateSource.of(CHATML), asked())

    run(test)


def test_text_that_grows_too_long_is_refused() -> None:
    async def test() -> None:
        long = TemplateSource.of("{% for i in range(9999) %}{{ 'ä' * 300 }}{% endfor %}")
        longer = TemplateSource.of("{% for i in range(9999) %}{{ 'a' * 3000 }}{% endfor %}")
        async with pool() as templates:
            assert "4 MiB" in await refused(templates.render(long, asked()))
            assert "characters" in await refused(templates.render(longer, asked()))

    run(test)


def test_refusal_of_the_template_is_passed_on_in_its_words() -> None:
    async def test() -> None:
        source = TemplateSource.of("{{ raise_exception('roles must alternate') }}")
        async with pool() as templates:
            assert "roles must alternate" in await refused(templates.render(source, asked()))

    run(test)


def test_half_a_surrogate_pair_survives_the_way() -> None:
    async def test() -> None:
        async with pool() as templates:
            assert await templates.render(TemplateSource.of("{{ '\\ud800' }}"), asked()) == "\ud800"

    run(test)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("out of time", "too long"), ("crash", "too much memory"), ("spent", "too much memory"),
        ("flood", "too much memory"), ("gibberish", "too much memory"),
    ],
)  # fmt: skip
def test_worker_that_ends_ends_its_request_alone(what: str, message: str) -> None:
    async def test() -> None:
        async with pool(command()) as templates:
            lost = asyncio.ensure_future(templates.render(MINE, wish(what)))
            assert await templates.render(THEIRS, wish("fine")) == "fine"
            assert message in await refused(lost)
            assert await templates.render(MINE, wish("fine")) == "fine"

    run(test)


def test_worker_that_hangs_is_killed_when_its_time_is_over() -> None:
    async def test() -> None:
        limits = RenderLimits(wall_s=0.2, wait_s=240.0)
        async with pool(command(), limits) as templates:
            assert "too long" in await refused(templates.render(MINE, wish("hang")))

    run(test)


def test_template_that_hung_has_less_time_the_next_time() -> None:
    async def test() -> None:
        limits = RenderLimits(cpu_s=8.0, wall_s=120.0, wait_s=240.0, forgive_s=1e6)
        async with pool(command(), limits) as templates:
            assert await templates.render(MINE, wish("limit")) == "8.0"
            await refused(templates.render(MINE, wish("out of time")))
            assert await templates.render(MINE, wish("limit")) == "2.0"
            assert await templates.render(THEIRS, wish("limit")) == "8.0"

    run(test)


def test_template_that_took_all_memory_costs_one_worker_and_has_less_time_the_next_time(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        log = tmp_path / "asked"
        limits = RenderLimits(cpu_s=8.0, wall_s=120.0, wait_s=240.0, forgive_s=1e6)
        async with pool(command(f"log={log}"), limits) as templates:
            assert "memory" in await refused(templates.render(MINE, wish("spent")))
            assert log.read_text().split() == ["8.0", "8.0"]  # a new worker is asked once more
            assert "memory" in await refused(templates.render(MINE, wish("spent")))
            assert log.read_text().split() == ["8.0", "8.0", "2.0"]
            assert "memory" in await refused(templates.render(THEIRS, wish("spent")))
            assert log.read_text().split()[3:] == ["8.0", "8.0"]

    run(test)


def test_worker_that_somebody_else_kills_is_not_the_templates_fault(tmp_path: Path) -> None:
    async def test() -> None:
        log = tmp_path / "asked"
        limits = RenderLimits(cpu_s=8.0, wall_s=120.0, wait_s=240.0, forgive_s=1e6)
        async with pool(command(f"log={log}"), limits) as templates:
            for _ in range(2):
                with pytest.raises(NotReadyError, match="killed"):
                    await templates.render(MINE, wish("killed"))
            assert (
                log.read_text().split() == ["8.0"] * 4
            )  # each is tried twice, and trusted as ever
            assert await templates.render(MINE, wish("limit")) == "8.0"

    run(test)


def test_stopped_templates_are_told_once_each(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        limits = RenderLimits(wall_s=120.0, wait_s=240.0, forgive_s=1e6)
        async with pool(command(), limits) as templates:
            for what in ("spent", "out of time") * 3:
                for template in (MINE, THEIRS):
                    await refused(templates.render(template, wish(what)))

    run(test)
    told = [record.getMessage() for record in caplog.records if "stopped" in record.getMessage()]
    assert len(told) == 2
    assert MINE.digest[:12] in told[0]
    assert THEIRS.digest[:12] in told[1]


def test_worker_that_speaks_unasked_is_killed() -> None:
    async def test() -> None:
        limits = RenderLimits(wall_s=120.0, wait_s=1.0)
        async with pool(command("talkative"), limits) as templates:
            with pytest.raises((NotReadyError, InvalidRequestError)):
                await templates.render(MINE, wish("fine"))

    run(test)


@pytest.mark.parametrize("workers", [command("mute"), ("/nonexistent/program",)])
def test_without_workers_nobody_waits_for_ever(workers: Sequence[str]) -> None:
    async def test() -> None:
        async with pool(workers, RenderLimits(wait_s=0.5)) as templates:
            with pytest.raises(LinkerError):
                await templates.render(MINE, wish("fine"))

    run(test)


def test_workers_see_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    async def test() -> None:
        async with pool(command()) as templates:
            names = (await templates.render(MINE, wish("environment"))).split()
        assert "MALLOC_ARENA_MAX" in names
        assert "HF_TOKEN" not in names

    run(test)


def test_one_template_has_half_of_the_workers_at_most() -> None:
    async def test() -> None:
        async with pool(command(), number=4) as templates:
            hanging = [asyncio.ensure_future(templates.render(MINE, wish("hang"))) for _ in "abcd"]
            pids = {await templates.render(THEIRS, wish("pid")) for _ in range(20)}
            assert pids  # the others answer, again and again
            assert templates._turns.num_running(MINE.digest) <= 2
            for one in hanging:
                one.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

    run(test)


def test_too_many_that_wait_for_one_template_are_refused() -> None:
    async def test() -> None:
        limits = RenderLimits(wall_s=120.0, wait_s=240.0, max_waiting=3)
        async with pool(command(), limits) as templates:
            hanging = [asyncio.ensure_future(templates.render(MINE, wish("hang")))]
            assert await templates.render(THEIRS, wish("fine")) == "fine"  # the first one runs
            for _ in "abc":
                hanging.append(asyncio.ensure_future(templates.render(MINE, wish("hang"))))
                await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                await templates.render(MINE, wish("hang"))
            assert await templates.render(THEIRS, wish("fine")) == "fine"
            for one in hanging:
                one.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

    run(test)


def test_client_that_leaves_gives_its_worker_back() -> None:
    async def test() -> None:
        async with pool(command()) as templates:
            for _ in range(30):
                left = asyncio.ensure_future(templates.render(MINE, wish("unheard")))
                await asyncio.sleep(0)
                left.cancel()
                with suppress(asyncio.CancelledError):
                    await left
                assert await templates.render(MINE, wish("heard")) == "heard"
            assert not templates._turns.num_waiting(MINE.digest)

    run(test)


def test_close_refuses_who_waits_and_leaves_no_process() -> None:
    async def test() -> None:
        templates = Templates(command=command(), limits=PATIENT)
        pids = {await templates.render(source, wish("pid")) for source in (MINE, THEIRS) * 5}
        hanging = [asyncio.ensure_future(templates.render(MINE, wish("hang"))) for _ in "abc"]
        await asyncio.sleep(0)
        await templates.close()
        results = await asyncio.gather(*hanging, return_exceptions=True)
        assert [type(one) for one in results] == [NotReadyError] * 3
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid), 0)
        with pytest.raises(NotReadyError):
            await templates.render(MINE, wish("fine"))

    run(test)
