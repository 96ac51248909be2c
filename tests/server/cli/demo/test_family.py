from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from linker_core.errors import LinkerError
from server.cli.demo.family import default_cache, ensure_family

BUILDER = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[-1])
with open(sys.argv[1], "a") as log:
    log.write(str(folder) + "\\n")
(folder / "base").mkdir()
(folder / "base" / "config.json").write_text("{}")
print(json.dumps({"model": "base", "done": 1, "total": 2}), flush=True)
if sys.argv[2] == "hang":
    time.sleep(600)
if sys.argv[2] == "fail":
    sys.exit("out of ideas")
(folder / "family.json").write_text("{}")
print(json.dumps({"model": "code", "done": 2, "total": 2}), flush=True)
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def command(log: Path, how: str = "well") -> list[str]:
    return [sys.executable, "-c", BUILDER, str(log), how]


def ignore(_model: str, _done: int, _total: int) -> None:
    pass


def visible(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


def test_family_is_built_once_and_then_found(tmp_path: Path, log: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    cache = tmp_path / "cache"
    first = ensure_family(cache, lambda *step: steps.append(step), command=command(log))
    again = ensure_family(cache, ignore, command=command(log))
    assert first == again
    assert (first / "family.json").is_file()
    assert (first / "base" / "config.json").is_file()
    assert steps == [("base", 1, 2), ("code", 2, 2)]
    assert len(log.read_text().splitlines()) == 1
    assert visible(cache) == [first.name]


def test_failed_build_leaves_nothing_and_says_why(tmp_path: Path, log: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(LinkerError, match="status 1: out of ideas"):
        ensure_family(cache, ignore, command=command(log, "fail"))
    assert visible(cache) == []
    assert ensure_family(cache, ignore, command=command(log)).is_dir()


def test_interrupted_build_leaves_nothing(tmp_path: Path, log: Path) -> None:
    def interrupt(_model: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        ensure_family(cache, interrupt, command=command(log, "hang"))
    assert visible(cache) == []


def test_ctrl_c_while_the_training_is_silent_leaves_nothing(tmp_path: Path, log: Path) -> None:
    cache = tmp_path / "cache"
    program = (
        "import sys; from pathlib import Path; from server.cli.demo.family import ensure_family\n"
        "ensure_family(Path(sys.argv[1]), lambda *s: print(*s, flush=True), command=sys.argv[2:])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(cache), *command(log, "hang")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "base 1 2\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert "KeyboardInterrupt" in errors
    assert visible(cache) == []


def test_killed_build_is_swept_by_the_next(tmp_path: Path, log: Path) -> None:
    left_over = tmp_path / "cache" / ".staging-killed"
    left_over.mkdir(parents=True)
    (left_over / "half").write_text("")
    family = ensure_family(tmp_path / "cache", ignore, command=command(log))
    assert visible(tmp_path / "cache") == [family.name]


def test_two_at_once_build_once(tmp_path: Path, log: Path) -> None:
    threads = [
        threading.Thread(
            target=ensure_family,
            args=(tmp_path / "cache", ignore),
            kwargs={"command": command(log)},
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.read_text().splitlines()) == 1


def test_folder_that_cannot_be_written_names_the_remedy(tmp_path: Path, log: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LinkerError, match="--cache"):
        ensure_family(tmp_path / "file" / "cache", ignore, command=command(log))


@pytest.mark.parametrize(
    ("data", "expected"),
    [("/data", "/data/linker-llm/demo"), ("", "/home/me/.local/share/linker-llm/demo"),
     ("relative", "/home/me/.local/share/linker-llm/demo")],
)  # fmt: skip
def test_default_cache_follows_the_data_directory(
    monkeypatch: pytest.MonkeyPatch, data: str, expected: str
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", data)
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache() == Path(expected)
