"""Compiled code: kept where only its user can write, and read only if it is whole."""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from linker_core import machine_code
from linker_core.machine_code import (
    cache_directory,
    cached_code,
    compile_module,
    host_features,
    load_code,
    seal,
)

ADDS = """
define i64 @plus(i64 %a, i64 %b) {
  %sum = add i64 %a, %b
  ret i64 %sum
}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "linker" / "code"


class Builds:
    """Counts how often something is built."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> bytes:
        self.count += 1
        return b"code"


def test_compiled_module_does_what_its_text_says() -> None:
    initialised = f'target triple = "{llvm.get_process_triple()}"\n'
    engine = load_code(compile_module(initialised + ADDS))
    plus = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    function: Callable[[int, int], int] = plus(engine.get_function_address("plus"))
    assert function(40, 2) == 42


def test_code_is_built_once_for_the_same_sources(folder: Path) -> None:
    builds = Builds()
    for _ in range(3):
        assert cached_code("thing", sources=b"a", build=builds) == b"code"
    assert builds.count == 1
    (file,) = folder.iterdir()
    assert file.name.startswith("thing-")
    assert file.read_bytes() == seal(b"code")


@pytest.mark.parametrize(("name", "sources"), [("other", b"a"), ("thing", b"b")])
def test_other_names_and_sources_are_built_anew(name: str, sources: bytes) -> None:
    builds = Builds()
    cached_code("thing", sources=b"a", build=builds)
    cached_code(name, sources=sources, build=builds)
    assert builds.count == 2


def test_another_cpu_builds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = Builds()
    cached_code("thing", sources=b"a", build=builds)
    monkeypatch.setattr(machine_code, "host_features", lambda: ("other", "+vectors"))
    cached_code("thing", sources=b"a", build=builds)
    assert builds.count == 2


@pytest.mark.parametrize("damage", ["cut", "turned", "emptied"])
def test_damaged_file_is_built_again_and_replaced(folder: Path, damage: str) -> None:
    builds = Builds()
    cached_code("thing", sources=b"a", build=builds)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    turned = bytes([*whole[:-1], whole[-1] ^ 1])
    file.write_bytes({"cut": whole[:-1], "turned": turned, "emptied": b""}[damage])
    assert cached_code("thing", sources=b"a", build=builds) == b"code"
    assert builds.count == 2
    assert file.read_bytes() == whole
    assert list(folder.iterdir()) == [file]


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_folder_that_others_can_write_is_neither_read_nor_written(
    folder: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    builds = Builds()
    cached_code("thing", sources=b"a", build=builds)
    (file,) = folder.iterdir()
    file.write_bytes(seal(b"planted"))
    folder.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert cached_code("thing", sources=b"a", build=builds) == b"code"
    assert builds.count == 2
    assert "is not this user's alone" in caplog.text
    assert file.read_bytes() == seal(b"planted")


def test_folder_of_somebody_else_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = Builds()
    cached_code("thing", sources=b"a", build=builds)
    stranger = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    cached_code("thing", sources=b"a", build=builds)
    assert builds.count == 2


def test_folder_is_made_for_its_user_alone(folder: Path) -> None:
    cached_code("thing", sources=b"a", build=Builds())
    assert folder.stat().st_mode & 0o777 == 0o700


def test_cache_that_its_group_may_write_still_keeps_code(folder: Path) -> None:
    folder.parent.mkdir()
    folder.parent.chmod(0o775)  # as other commands make it where the umask is 002
    builds = Builds()
    for _ in range(2):
        cached_code("thing", sources=b"a", build=builds)
    assert builds.count == 1


def test_without_room_for_a_cache_code_is_still_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "a-file"
    taken.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(taken))
    builds = Builds()
    for _ in range(2):
        assert cached_code("thing", sources=b"a", build=builds) == b"code"
    assert builds.count == 2


def test_code_that_cannot_be_kept_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: object, **__: object) -> tuple[int, str]:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    assert cached_code("thing", sources=b"a", build=Builds()) == b"code"
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a-file"))
    assert cached_code("other", sources=b"a", build=Builds()) == b"code"
    read_only_told, no_folder_told = caplog.messages
    assert "thing is compiled at every start" in read_only_told
    assert "other is compiled at every start" in no_folder_told


def test_other_ways_of_compiling_build_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = Builds()
    cached_code("thing", sources=b"a", build=builds)
    other = tmp_path / "machine_code.py"
    other.write_bytes(Path(machine_code.__file__).read_bytes() + b"# and more")
    monkeypatch.setattr(machine_code, "__file__", str(other))
    cached_code("thing", sources=b"a", build=builds)
    assert builds.count == 2


def test_features_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for triple, named in (("x86_64-unknown-linux-gnu", True), ("aarch64-linux-gnu", False)):
        monkeypatch.setattr(llvm, "get_process_triple", lambda triple=triple: triple)
        assert ("prefer-256-bit" in host_features()[1].split(",")[-1]) is named


def test_cache_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "linker"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_directory() == tmp_path / "home" / ".cache" / "linker"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / "home" / ".cache" / "linker"


def test_file_that_cannot_be_finished_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, _target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert cached_code("thing", sources=b"a", build=Builds()) == b"code"
    assert list(folder.iterdir()) == []


def test_file_long_unused_goes_when_its_name_is_built_anew(folder: Path) -> None:
    builds = Builds()
    cases = [("thing", b"old"), ("thing", b"used"), ("thing-else", b"old")]
    for name, sources in cases:
        cached_code(name, sources=sources, build=builds)
    unfinished = folder / (min(folder.glob("thing-*.o")).name + "x7")
    unfinished.touch()
    for file in folder.iterdir():
        os.utime(file, (0, time.time() - 31 * 24 * 3600))
    cached_code("thing", sources=b"used", build=builds)  # from its file: nothing is dropped
    assert (builds.count, len(list(folder.iterdir()))) == (3, 4)
    cached_code("thing", sources=b"new", build=builds)
    assert not unfinished.exists()
    built = []
    for name, sources in (("thing", b"new"), *cases):
        before = builds.count
        cached_code(name, sources=sources, build=builds)
        built.append(builds.count > before)
    assert built == [False, True, False, False]


def test_file_of_a_cache_that_cannot_be_written_is_still_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_only(_path: Path) -> None:
        raise OSError(30, "Read-only file system")

    builds = Builds()
    cached_code("thing", sources=b"a", build=builds)
    monkeypatch.setattr(os, "utime", read_only)
    assert cached_code("thing", sources=b"a", build=builds) == b"code"
    assert builds.count == 1
