from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from server.cli.top import amounts
from server.cli.top.fleet import Fleet
from server.cli.top.view import Frame
from tests.server.cli.top.said import MIB, card, job, snapshot, status

NOW_S = 50.0  # of the clock of this side


def shown(
    *events: dict[str, Any],
    width: int = 120,
    height: int | None = None,
    encoding: str = "utf-8",
    now_s: float = NOW_S,
) -> list[str]:
    """Returns the lines of a frame after events, without what is only colour."""
    fleet = Fleet()
    for event in events:
        fleet.apply(event, now_s=NOW_S)
    return frame(fleet, width=width, height=height, encoding=encoding, now_s=now_s)


def frame(
    fleet: Fleet,
    *,
    width: int = 120,
    height: int | None = None,
    encoding: str = "utf-8",
    now_s: float = NOW_S,
) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(file=file, width=width, height=height)
    console.print(Frame(fleet=fleet, url="http://here", now_s=now_s, fits=height is not None))
    file.flush()
    assert isinstance(file.buffer, io.BytesIO)
    return file.buffer.getvalue().decode(encoding).splitlines()


def line(lines: list[str], beginning: str) -> str:
    return next(one for one in lines if one.strip().startswith(beginning))


FAMILY = (card("base"), card("chat", donor="base"), card("math", donor="base", state="unloaded"))


def test_head_says_state_work_and_hits() -> None:
    lines = shown(snapshot(*FAMILY), status())
    assert lines[0] == "linker top  http://here  ready  engine running"
    assert "running 2  waiting 1  KV 25%  prefix hits 25%" in lines[1]


def test_why_a_server_is_not_ready_is_said() -> None:
    down = status(engine="starting", ready=False, reason="the engine is starting", device=None)
    lines = shown(snapshot(), down)
    assert lines[0].endswith("not ready  engine starting  the engine is starting")
    assert not any("weights" in one for one in lines)


def test_server_without_a_status_is_called_older() -> None:
    assert shown(snapshot(*FAMILY))[0].rstrip() == "linker top  http://here"
    late = shown(snapshot(*FAMILY), now_s=NOW_S + 2)
    assert "may be older than linker top" in late[0]


def test_rates_are_differences_over_the_servers_own_time() -> None:
    lines = shown(
        snapshot(*FAMILY), status(at_s=100.0, tokens=1000), status(at_s=104.0, tokens=1200)
    )
    assert lines[1].startswith("50.0 tok/s  prompts 0 tok/s")
    assert line(lines, "chat").split()[-2] == "50.0"
    assert line(lines, "base").split()[-2] == "0"


def test_one_status_is_no_rate_until_nothing_has_come_for_long() -> None:
    events = (snapshot(*FAMILY), status())
    assert shown(*events)[1].startswith("- tok/s")
    assert shown(*events, now_s=NOW_S + 10)[1].startswith("0 tok/s")


def test_rate_ends_with_the_statuses() -> None:
    events = (snapshot(*FAMILY), status(at_s=1.0, tokens=0), status(at_s=2.0, tokens=70))
    assert shown(*events)[1].startswith("70.0 tok/s")
    assert shown(*events, now_s=NOW_S + 10)[1].startswith("0 tok/s")


def test_totals_that_went_back_are_no_rate() -> None:
    events = (status(at_s=1.0, tokens=900), status(at_s=2.0, tokens=10))
    assert shown(snapshot(*FAMILY), *events)[1].startswith("- tok/s")


def test_another_snapshot_is_compared_with_nothing_before_it() -> None:
    again = (snapshot(*FAMILY), status(at_s=2.0, tokens=5000))
    lines = shown(snapshot(*FAMILY), status(at_s=1.0, tokens=10), *again)
    assert lines[1].startswith("- tok/s")


def test_savings_are_of_resident_models() -> None:
    # Of 200 MiB in two separate copies 125 are held; the third is not resident.
    saved = line(shown(snapshot(*FAMILY), status()), "saved")
    assert saved == "saved 75.0M = 38% of the 200M of 2 separate copies"


def test_unshared_weights_save_nothing() -> None:
    device = status()["device"]
    twin = device | {"weights": 225 * MIB, "free": 665 * MIB}
    saved = line(shown(snapshot(*FAMILY), status(device=twin)), "saved")
    assert saved == "saved -25.0M = -12% of the 200M of 2 separate copies"


def test_one_model_is_one_copy() -> None:
    alone = status()["device"] | {"weights": 100 * MIB, "free": 790 * MIB}
    saved = line(shown(snapshot(card("base")), status(device=alone)), "saved")
    assert saved == "saved 0B = 0% of the 100M of 1 separate copy"


def test_memory_bar_is_in_proportion_and_as_wide_as_the_terminal() -> None:
    lines = shown(snapshot(*FAMILY), status(), width=100)
    bar = lines[2]
    assert len(bar) == 100
    assert [bar.count(mark) for mark in "█▓▒░"] == [12, 10, 1, 77]
    assert lines[3].split("  ")[0] == "cpu"
    assert "weights 125M" in lines[3]
    assert "free 765M" in lines[3]


def test_what_is_there_is_seen_however_little_it_is() -> None:
    device = {"name": "cpu", "weights": 1, "kv": 1, "free": 10**12, "other": 0, "budget": 10**12}
    bar = shown(snapshot(), status(device=device), width=40)[2]
    assert [bar.count(mark) for mark in "█▓▒░"] == [1, 1, 0, 38]


def test_models_stand_below_their_donor_with_all_there_is_to_say() -> None:
    lines = shown(snapshot(*reversed(FAMILY)), status())
    rows = lines[lines.index(line(lines, "MODEL")) + 1 :]
    assert [row.split()[0] for row in rows[:3]] == ["base", "chat", "math"]
    assert rows[1].split() == [
        "chat", "ready", "25.0M", "75.0M", "75%", "0.0081", "<=", "0.01", "1/20/3", "2/1", "-",
        "now",
    ]  # fmt: skip
    assert rows[2].split()[:2] == ["math", "unloaded"]


def test_price_above_its_budget_is_shown_as_such() -> None:
    dear = card("chat", donor="base")
    dear["plan"]["price"]["kl_upper"] = 0.5
    assert "0.5 > 0.01" in line(shown(snapshot(dear), status()), "chat")


def test_price_just_within_its_budget_differs_from_it() -> None:
    near = card("chat", donor="base")
    near["plan"].update(price={"kl_upper": 0.04961}, budget_kl=0.05)
    for width in (80, 120):
        assert "0.0496 <= 0.05" in line(shown(snapshot(near), status(), width=width), "chat")


def test_model_that_is_not_planned_yet_has_dashes() -> None:
    new = card("chat", donor="base", state="onboarding", bytes=None, blocks=None, plan=None)
    row = line(shown(snapshot(new), status(models={})), "chat")
    assert row.split() == ["chat", "onboarding", "-", "-", "-", "-", "-", "-", "0", "-"]


def test_last_use_is_an_age() -> None:
    used = card("chat", donor="base", last_used_at=time.time() - 3 * 3600 - 60)
    assert line(shown(snapshot(used), status(models={})), "chat").endswith("3h")


def test_changes_take_the_place_of_what_was() -> None:
    lines = shown(
        snapshot(*FAMILY),
        status(),
        {"type": "model", "model": card("chat", donor="base", state="failed", pinned=True)},
        {"type": "model.deleted", "id": "math"},
        {"type": "of the future"},
    )
    assert line(lines, "chat").split()[:3] == ["chat", "*", "failed"]
    assert not any(one.strip().startswith("math") for one in lines)


def test_jobs_under_way_have_bars() -> None:
    queued = job("next", status="queued")
    lines = shown(snapshot(jobs=(job("chat"), queued)), status())
    bar = "█" * 10 + "░" * 10
    assert line(lines, "chat") == f"chat  scanning {bar} 50% of 100M  10.0M/s  5s left"
    assert line(lines, "next") == "next  queued"


def told(*jobs: dict[str, Any]) -> list[str]:
    return shown(snapshot(), status(), *({"type": "job", "job": one} for one in jobs))


def test_job_that_ended_well_is_gone() -> None:
    lines = told(job("chat"), job("chat", status="succeeded"), job("math", status="cancelled"))
    assert not any(one.startswith(("chat", "math")) for one in lines)


def test_last_job_that_failed_says_why_until_its_model_has_another() -> None:
    first = job("chat", status="failed", error={"message": "a tensor is missing"})
    second = job("math", status="failed", error={"message": "no room"})
    assert (
        line(told(job("chat"), first), "chat") == "chat  failed while scanning: a tensor is missing"
    )
    lines = told(first, second, job("code"))
    assert not any(one.startswith("chat") for one in lines)
    assert line(lines, "math") == "math  failed while scanning: no room"
    again = job("math", id="another")
    assert line(told(second, again), "math").startswith("math  scanning ███")


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ((), "linker top  ready  engine running"),
        (("the server is gone",), "linker top  the server is gone; trying …"),
    ],
)
def test_url_gives_way_to_the_state(events: tuple[str, ...], said: str) -> None:
    fleet = Fleet()
    fleet.apply(snapshot(*FAMILY), now_s=NOW_S)
    fleet.apply(status(), now_s=NOW_S)
    for trouble in events:
        fleet.trouble = trouble
    assert frame(fleet, width=40)[0] == said
    assert "http://here" in frame(fleet, width=60)[0]


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    long = card("an/" + "x" * 90, donor="base", last_used_at=time.time())
    lines = shown(
        snapshot(*FAMILY, long, jobs=(job("a" * 50),)),
        status(reason="a reason that takes a hundred characters" * 3),
        width=width,
    )
    assert max(map(len, lines)) <= width
    assert line(lines, "chat").split()[0] == "chat"


def test_eighty_columns_show_state_bytes_price_and_work() -> None:
    lines = shown(snapshot(*FAMILY), status(), width=80)
    head = line(lines, "MODEL").split()
    assert head == ["MODEL", "STATE", "UNIQUE", "SHARED", "SAVED", "KL,", "BUDGET", "RUN", "TOK/S"]


def test_models_that_do_not_fit_are_counted_and_the_busy_ones_are_shown() -> None:
    crowd = [card(f"m{place:02}", donor="base") for place in range(40)]
    lines = shown(snapshot(card("base"), card("chat", donor="base"), *crowd), status(), height=20)
    assert len(lines) <= 20
    assert line(lines, "chat")
    shown_rows = [one for one in lines if one.strip().startswith("m")]
    [said] = [one.strip() for one in lines if one.startswith("and ")]
    assert said == f"and {42 - 1 - len(shown_rows) - bool(base_is_shown(lines))} more"


@pytest.mark.parametrize(
    ("height", "memory"), [(12, ["weights", "saved"]), (10, ["saved"]), (9, ["saved"]), (8, [])]
)
def test_memory_gives_way_to_the_models_with_work(height: int, memory: list[str]) -> None:
    names = ("base", "chat", "code", "math")
    work = {"running": 1, "waiting": 0, "generation_tokens": 5}
    models = [card(name, donor=None if name == "base" else "base") for name in names]
    busy = status(models={"chat": work, "math": work})
    lines = shown(snapshot(*models), busy, height=height)
    assert len(lines) <= height
    assert [what for what in ("weights", "saved") if any(what in one for one in lines)] == memory
    assert line(lines, "chat")
    assert line(lines, "math")


def base_is_shown(lines: list[str]) -> bool:
    return any(one.startswith("base") for one in lines)


def test_everything_is_shown_where_nothing_bounds_the_height() -> None:
    crowd = [card(f"m{place:02}", donor="base") for place in range(40)]
    lines = shown(snapshot(*crowd), status())
    assert sum(one.strip().startswith("m") for one in lines) == 40


def test_ascii_terminal_gets_ascii() -> None:
    lines = shown(snapshot(*FAMILY, jobs=(job("new"),)), status(), encoding="ascii", width=60)
    assert line(lines, "###")
    assert "##########.........." in line(lines, "new")
    assert "?" not in lines[2]


def test_texts_of_a_server_steer_no_terminal() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\r\nx[bold red]y"
    failed = job("chat", status="failed", error={"message": evil})
    lines = shown(
        snapshot(card(evil), jobs=()), status(reason=evil), {"type": "job", "job": failed}
    )
    everything = "\n".join(lines)
    assert "\x1b" not in everything
    assert "\x07" not in everything
    assert "[bold red]y" in everything  # shown, not obeyed


def test_trouble_is_said_beside_what_was_known() -> None:
    fleet = Fleet()
    fleet.apply(snapshot(*FAMILY), now_s=NOW_S)
    fleet.apply(status(), now_s=NOW_S)
    fleet.trouble = "the server is gone"
    lines = frame(fleet)
    assert lines[0].endswith("the server is gone; trying again")
    assert line(lines, "chat")


def test_price_has_digits_that_tell_it_from_its_budget() -> None:
    prices = (0.00812345, 0.0099996, 0.01, 0.0)
    shown_prices = [amounts.of_nats(price, beside=0.01) for price in prices]
    assert shown_prices == ["0.00812", "0.0099996", "0.01", "0"]


def test_bytes_are_short() -> None:
    shown_bytes = [amounts.of_bytes(n) for n in (0, 999, 1000, 1536, 100 * MIB, 1023 * MIB, 2**50)]
    assert shown_bytes == ["0B", "999B", "1.0K", "1.5K", "100M", "1.0G", "1024T"]
