"""`linker top` as it is run: against a server, without one, and while one comes and goes."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.cli.main import EXIT_BROKEN_PIPE, EXIT_USAGE, main
from server.registry.records import Role
from tests.server.cli.top.said import card, snapshot, status
from tests.server.cli.top.stub import Answer, Stub, stub_server
from tests.server.keyed import give_key
from tests.server.live import LiveServer, live_server

DEADLINE_S = 60.0
TOP = (sys.executable, "-m", "server.cli.main", "top", "--interval", "0.1")
# Whose Ctrl-C is then its own.
OF_ITS_OWN_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
Run = tuple[int, str, str]


def top(capsys: pytest.CaptureFixture[str], *arguments: str) -> Run:
    capsys.readouterr()
    code = main(["top", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    stub.says(snapshot(card("base"), card("chat", donor="base")), status())
    with stub_server(stub):
        yield stub


def test_once_prints_what_a_real_server_says(
    capsys: pytest.CaptureFixture[str], server: LiveServer
) -> None:
    assert server.complete("near", [5, 6, 7], max_tokens=3).status_code == 200
    code, out, err = top(capsys, "--url", server.url, "--once")
    assert (code, err) == (0, "")
    assert out.startswith(f"linker top  {server.url}  ready  engine running\n")
    base, near = (line.split() for line in out.splitlines() if line.strip()[:4] in ("base", "near"))
    cards = {one["id"]: one for one in server.client.get("/models").json()["data"]}
    sizes = cards["near"]["bytes"]
    assert near[1] == "ready"
    assert near[4] == f"{100 * sizes['saved'] / sizes['logical']:.0f}%"
    assert base[4] == "0%"
    assert "saved " in out
    assert "\x1b" not in out


def test_once_needs_no_second_status_of_a_server_that_is_still(
    capsys: pytest.CaptureFixture[str], stub: Stub
) -> None:
    code, out, _ = top(capsys, "--url", stub.url, "--once")
    assert code == 0
    assert "- tok/s" in out


def test_once_shows_rates_where_something_happens(
    capsys: pytest.CaptureFixture[str], stub: Stub
) -> None:
    stub.says(snapshot(card("base")), status(at_s=1.0, tokens=0), status(at_s=2.0, tokens=30))
    assert "30.0 tok/s" in top(capsys, "--url", stub.url, "--once")[1]


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    stub = Stub()
    with stub_server(stub):
        pass
    code, out, err = top(capsys, "--url", stub.url)
    assert (code, out) == (EXIT_USAGE, "")
    assert err.startswith(f"linker top: There is no server at {stub.url} (")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "kind", "body", "said"),
    [
        (404, "text/html", b"<h1>no</h1>", "answered 404 to GET /models/events"),
        (200, "text/html", b"<h1>hello</h1>", "is no linker server"),
        (500, "application/json", b'{"error":{"code":null,"message":"x"}}', "answered 500"),
        (500, "application/json", b'["error"]', "answered 500"),
    ],
)
def test_another_server_is_one_line(
    capsys: pytest.CaptureFixture[str], stub: Stub, code: int, kind: str, body: bytes, said: str
) -> None:
    stub.answer = Answer(code, kind, body)
    stub.hang_up.set()
    done, out, err = top(capsys, "--url", stub.url)
    assert (done, out) == (EXIT_USAGE, "")
    assert said in err
    assert err.count("\n") == 1


def test_server_of_another_time_is_one_line(capsys: pytest.CaptureFixture[str], stub: Stub) -> None:
    stub.says({"type": "snapshot", "fleets": []})
    code, _, err = top(capsys, "--url", stub.url)
    assert code == EXIT_USAGE
    assert "says something that this command does not understand" in err
    assert err.count("\n") == 1


def test_server_without_a_status_shows_its_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stub: Stub
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stub.says(snapshot(card("base")))
    code, out, _ = top(capsys, "--url", stub.url, "--once")
    assert code == 0
    assert "may be older than linker top" in out
    assert "base " in out


@pytest.mark.parametrize("url", ["nowhere", "ftp://here", "http://", "http://here:port"])
def test_what_is_no_url_is_a_usage_error(capsys: pytest.CaptureFixture[str], url: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["top", "--url", url])
    assert raised.value.code == EXIT_USAGE
    assert "argument --url" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "x"])
def test_interval_is_a_time(capsys: pytest.CaptureFixture[str], interval: str) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--interval", interval])
    assert f"argument --interval: '{interval}' is no number" in capsys.readouterr().err


def test_output_that_is_no_terminal_is_as_wide_as_columns_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stub: Stub
) -> None:
    widths = []
    for columns in ("60", "0", "wide"):
        monkeypatch.setenv("COLUMNS", columns)
        _, out, _ = top(capsys, "--url", stub.url, "--once")
        widths.append(max(map(len, out.splitlines())))
    assert widths == [60, 120, 120]  # the memory's bar takes all there is


def test_keys_of_operators_and_of_metrics_may_watch(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    keys = {role: give_key(state, role).key for role in Role}
    with live_server(state, models=models) as live:
        live.client.headers["Authorization"] = f"Bearer {keys[Role.ADMIN]}"
        live.until_ready()
        for role in (Role.ADMIN, Role.METRICS):
            code, out, _ = top(capsys, "--url", live.url, "--once", "--key", keys[role])
            assert (code, "near" in out) == (0, True)
        monkeypatch.setenv("LINKER_API_KEY", keys[Role.METRICS])
        assert top(capsys, "--url", live.url, "--once")[0] == 0
        for key, said in ((keys[Role.CLIENT], "of role admin or metrics"), ("sk-wrong", "key")):
            code, out, err = top(capsys, "--url", live.url, "--key", key)
            assert (code, out) == (EXIT_USAGE, "")
            assert said in err
            assert key not in err
            assert err.count("\n") == 1


@contextmanager
def watching(stub: Stub) -> Iterator[subprocess.Popen[str]]:
    """Runs the command with its output in a pipe; the test ends it."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*TOP, "--url", stub.url], stdout=pipe, stderr=pipe, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def read_until(child: subprocess.Popen[str], said: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if said in line:
            return line
    raise AssertionError(f"it ended before it said {said!r}")


def test_server_that_comes_back_is_watched_again(stub: Stub) -> None:
    with watching(stub) as child:
        read_until(child, "  chat")
        stub.answer = refused(503, "not_ready", "The server is shutting down.")
        stub.hang_up.set()
        read_until(child, "The server is shutting down.; trying again")
        stub.hang_up.clear()
        stub.says(snapshot(card("another")), status())
        read_until(child, "another")
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=DEADLINE_S)
        assert (child.returncode, err) == (0, "")


def test_server_that_is_gone_is_waited_for() -> None:
    stub = Stub()
    stub.says(snapshot(card("base")), status())
    with stub_server(stub), watching(stub) as child:
        read_until(child, "base")
        stub.hang_up.set()
        read_until(child, "trying again")
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=DEADLINE_S)


def test_key_that_is_revoked_meanwhile_ends_it(stub: Stub) -> None:
    with watching(stub) as child:
        read_until(child, "  chat")
        stub.answer = refused(401, "invalid_api_key", "This key is revoked.")
        stub.hang_up.set()
        _, err = child.communicate(timeout=DEADLINE_S)
        assert (child.returncode, err) == (EXIT_USAGE, "linker top: This key is revoked.\n")


def refused(status: int, code: str, message: str) -> Answer:
    error = {"code": code, "message": message, "param": None}
    return Answer(status, "application/json", json.dumps({"error": error}).encode())


def test_reader_that_has_seen_enough_ends_it(stub: Stub) -> None:
    with watching(stub) as child:
        assert child.stdout is not None
        read_until(child, "  chat")
        child.stdout.close()
        assert child.wait(DEADLINE_S) == EXIT_BROKEN_PIPE
        assert child.stderr is not None
        assert child.stderr.read() == ""


@pytest.mark.parametrize("how", ["ctrl-c", "q", "kill"])
def test_terminal_is_left_as_it_was_found(stub: Stub, how: str) -> None:
    parent, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    command = [sys.executable, "-c", OF_ITS_OWN_TERMINAL, *TOP, "--url", stub.url]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ) as child:
        seen = until_seen(parent, b"chat")
        assert b"\x1b[?1049h" in seen  # a screen of its own
        if how == "kill":
            child.terminate()
        else:
            os.write(parent, {"ctrl-c": b"\x03", "q": b"q"}[how])
        seen += until_seen(parent, b"\x1b[?1049l")
        assert child.wait(DEADLINE_S) == 0
    assert termios.tcgetattr(terminal) == before
    os.close(terminal)
    seen += until_closed(parent)
    os.close(parent)
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h")
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")  # the cursor is seen again
    assert b"Traceback" not in seen


def until_seen(descriptor: int, wanted: bytes) -> bytes:
    give_up_at = time.monotonic() + DEADLINE_S
    seen = b""
    while wanted not in seen:
        assert time.monotonic() < give_up_at, seen
        if select.select([descriptor], [], [], 1.0)[0]:
            seen += os.read(descriptor, 65536)
    return seen


def until_closed(descriptor: int) -> bytes:
    seen = b""
    try:
        while more := os.read(descriptor, 65536):
            seen += more
    except OSError:  # how Linux says that nobody holds the other end any more
        pass
    return seen
