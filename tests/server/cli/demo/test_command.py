from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from linker_core.errors import InvalidRequestError
from linker_core.tuning.request import DEFAULT_BUDGET_KL
from server.cli import demo
from server.cli.demo import command
from server.cli.demo.build import FamilyBuilder
from server.cli.demo.command import state_of
from server.cli.demo.family import OnProgress
from server.cli.demo.recipes import FAMILY, MODELS, tiny, version
from server.cli.serve_options import add_arguments, settings_from
from server.registry.records import Role
from server.settings import Settings
from tests.server.keyed import give_key, revoke_key


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds a family already, of models too small to say anything."""
    folder = tmp_path_factory.mktemp("cache")
    family = folder / version(FAMILY)
    family.mkdir()
    FamilyBuilder(tiny(FAMILY, steps=2), lambda _model, _done, _total: None).build(family)
    return folder


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


def parse_serve(*arguments: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_from(parser.parse_args(arguments))


@contextmanager
def running(
    *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli.main", "demo", *arguments],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_taken_port_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with pytest.raises(InvalidRequestError, match=f"port {port}.*--port"):
            demo.run(parse("--port", str(port), "--cache", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_once_ends_after_the_table_and_a_second_time_works_on_what_is_there(
    cache: Path, tmp_path: Path
) -> None:
    for attempt in ("first", "second"):
        port, file = free_port(), tmp_path / f"{attempt}.json"
        arguments = ("--port", str(port), "--cache", str(cache), "--json", str(file))
        with running(*arguments, environment={"ONCE": "1"}) as process:
            table, log = process.communicate()
        assert process.returncode == 0, log
        assert "separate copies would hold" in " ".join(table.split())
        rows = json.loads(file.read_text())
        assert [row["model"] for row in rows] == list(MODELS)
        for row in rows:
            assert row["blocks"]["total"] == 2
            assert row["bytes"]["logical"] == row["bytes"]["unique"] + row["bytes"]["shared"]
            assert row["bytes"]["checkpoint"] > 0
            assert sum(row["rung_bytes"].values()) == row["bytes"]["unique"]
        for row in rows[1:]:
            assert row["kl"] is not None
            assert row["kl"] <= DEFAULT_BUDGET_KL
            assert row["bytes"]["unique"] < row["bytes"]["logical"] / 2
        assert is_free(port)


def test_changed_model_is_shown_as_it_is(cache: Path, tmp_path: Path) -> None:
    (tmp_path / version(FAMILY)).symlink_to(cache / version(FAMILY))
    port, file = free_port(), tmp_path / "rows.json"
    arguments = ("--port", str(port), "--cache", str(tmp_path), "--json", str(file))
    with running(*arguments) as process:
        assert process.stdout is not None
        while not process.stdout.readline().lstrip().startswith("curl "):
            assert process.poll() is None
        change = urllib.request.Request(
            f"http://127.0.0.1:{port}/models/chat?wait=true",
            data=json.dumps({"policy": "exact"}).encode(),
            headers={"Content-Type": "application/json"},
            method="PATCH",
        )
        with urllib.request.urlopen(change) as reply:
            assert reply.status in (200, 202)
        process.send_signal(signal.SIGINT)
        process.communicate()
    with running(*arguments, environment={"ONCE": "1"}) as process:
        _, log = process.communicate()
    assert process.returncode == 0, log
    assert "chat is shown as it is: its options have been changed." in log
    rows = {row["model"]: row for row in json.loads(file.read_text())}
    assert list(rows) == list(MODELS)
    assert rows["chat"]["bytes"]["unique"] > rows["instruct"]["bytes"]["unique"]


@pytest.mark.parametrize("is_revoked", [False, True])
def test_state_with_keys_is_refused_before_anything_is_served(
    cache: Path, tmp_path: Path, is_revoked: bool
) -> None:
    family = tmp_path / version(FAMILY)
    family.symlink_to(cache / version(FAMILY))
    arguments = ("--port", str(free_port()), "--cache", str(tmp_path))
    state = state_of(family)
    made = give_key(state, Role.CLIENT)
    if is_revoked:
        revoke_key(state, made)
    with pytest.raises(InvalidRequestError, match=f"{state} has API keys.*remove the directory"):
        demo.run(parse(*arguments))
    assert [path.name for path in state.iterdir()] == ["registry.sqlite3"]


def test_training_without_a_terminal_is_told_ten_times_and_of_each_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"base": range(1, 241), "instruct": range(241, 301), "chat": range(301, 351)}

    def trained(_cache: Path, on_progress: OnProgress) -> Path:
        for model, numbers in steps.items():
            for done in numbers:
                on_progress(model, done, 350)
        return cache / version(FAMILY)

    monkeypatch.setattr(command, "ensure_family", trained)
    console = Console(file=io.StringIO(), width=80)
    command._family(tmp_path, console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "training base: step 1 of 350"
    assert lines[-1] == "training chat: step 350 of 350"
    told = [int(line.split()[3]) for line in lines]
    assert told == sorted(told)
    assert {35 * part for part in range(1, 11)} | {241, 301} <= set(told)
    assert len(told) < 15


def test_ctrl_c_stops_server_and_demo(cache: Path) -> None:
    port = free_port()
    with running("--port", str(port), "--cache", str(cache)) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while len([line for line in lines if line.lstrip().startswith("curl ")]) < 3:
            line = process.stdout.readline()
            assert line, "the demo ended before it served"
            lines.append(line)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as reply:
            served = json.load(reply)
        assert [model["id"] for model in served["data"]] == list(MODELS)
        page = f"http://127.0.0.1:{port}/ui"
        [about] = [one for one in lines if page in one]
        assert about.startswith(page)
        program = shlex.join([sys.executable, "-m", "server.cli.main"])
        assert f"`{program} top --url http://127.0.0.1:{port}`" in about
        with urllib.request.urlopen(page) as reply:
            assert reply.status == 200
        while not line.startswith(f"  {program} serve "):
            line = process.stdout.readline()
            assert line, "the demo does not say how to serve its models"
            lines.append(line)
        said = " ".join("".join(lines).split())
        assert "no API keys: whoever is on this machine" in said
        again = parse_serve(*shlex.split(line.removeprefix(f"  {program} serve ")))
        assert again.http.port == port
        assert again.models.root == cache / version(FAMILY)
        assert (again.state_directory() / "registry.sqlite3").is_file()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith("stopping; ")  # said as it begins
        process.communicate()
        assert process.returncode == 0
    assert is_free(port)


def test_model_that_fails_is_named_and_the_others_are_shown(cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / version(FAMILY)
    for name in MODELS:
        (broken / name).mkdir(parents=True)
        for path in (cache / version(FAMILY) / name).iterdir():
            (broken / name / path.name).write_bytes(path.read_bytes())
    (broken / "chat" / "model.safetensors").write_bytes(b"\0" * 100)
    arguments = ("--port", str(free_port()), "--cache", str(tmp_path))
    with running(*arguments, environment={"ONCE": "1"}) as process:
        table, log = process.communicate()
    assert process.returncode == 1
    assert "chat: " in log
    assert "code" in table
