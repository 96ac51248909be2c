"""Regions: every thread of torch's pool runs them, and they are compiled once."""

from __future__ import annotations

import inspect
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from llvmlite import ir

from linker_core.engine.cpu import coded_steps, regions
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.cpu.emitter import I64, POINTER, Emitter, i64
from linker_core.engine.cpu.regions import Region, compile_regions
from linker_core.errors import LinkerError
from linker_core.machine_code import cached_code
from linker_core.residency import coding
from linker_core.sharing import rungs

SLOTS = 64


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def forgotten_openmp() -> Iterator[None]:
    """Lets OpenMP be looked for anew, now and afterwards."""
    regions._openmp.cache_clear()
    yield
    regions._openmp.cache_clear()


def emit_marks(module: ir.Module) -> None:
    """Adds `marks`: each thread writes how many there are to its own slot, then all are summed.

    The record: address of the slots, the sum, and a counter that threads count to 1000.
    """
    e = Emitter(module, "marks", [POINTER])
    b, (task,) = e.builder, e.arguments
    slots = e.field(task, 0, POINTER)
    thread, num_threads = e.thread_number(), e.num_threads()
    e.store(num_threads, e.at(slots, thread, I64))
    e.barrier()
    total = e.variable(i64(0))
    with e.loop(0, num_threads) as number:
        total.set(b.add(total.get(), e.field(slots, number)))
    e.store(total.get(), e.at(slots, b.add(thread, i64(SLOTS)), I64))
    with e.taken(e.at(task, 1, I64), i64(1000)) as number:
        place = e.at(slots, b.add(number, i64(2 * SLOTS)), I64)
        e.store(b.add(e.load(place, I64), i64(1)), place)
    e.finish()


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_region_is_run_by_every_thread_and_again(num_threads: int) -> None:
    region = Region(compile_regions("marks", emit_marks), "marks")
    slots = np.zeros(2 * SLOTS + 1000, np.int64)
    call = region.call((slots.ctypes.data, 0), num_threads=num_threads, counter=1)
    for times in (1, 2, 3):
        slots[: 2 * SLOTS] = 0
        call.run()
        assert slots[:SLOTS].tolist() == [num_threads] * num_threads + [0] * (SLOTS - num_threads)
        # Behind the barrier every thread saw what all others had written.
        assert slots[SLOTS : SLOTS + num_threads].tolist() == [num_threads**2] * num_threads
        # Each piece of work was taken once, whoever took it.
        assert (slots[2 * SLOTS :] == times).all()


def test_region_leaves_torchs_own_threads_working() -> None:
    region = Region(compile_regions("marks", emit_marks), "marks")
    slots = np.zeros(2 * SLOTS + 1000, np.int64)
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    want = x @ x
    for _ in range(5):
        region.call((slots.ctypes.data, 0), num_threads=2, counter=1).run()
        assert torch.equal(x @ x, want)


def test_regions_are_compiled_once_and_then_loaded(tmp_path: Path) -> None:
    compiled: list[str] = []

    def emit(module: ir.Module) -> None:
        compiled.append(module.name)
        emit_marks(module)

    for _ in range(3):
        compile_regions("once", emit)
    assert compiled == ["once"]
    assert [path.suffix for path in (tmp_path / "linker" / "code").iterdir()] == [".o"]
    compile_regions("other", emit)
    assert compiled == ["once", "other"]


@pytest.mark.parametrize("module", [coding, rungs, coded_steps])
def test_regions_are_compiled_anew_when_numbers_in_them_change(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    seen: list[bytes] = []

    def noted(name: str, *, sources: bytes, build: Callable[[], bytes]) -> bytes:
        seen.append(sources)
        return cached_code(name, sources=sources, build=build)

    monkeypatch.setattr(regions, "cached_code", noted)
    compile_regions("numbers", emit_marks)
    assert inspect.getsource(module).encode() in seen[0]


@pytest.mark.usefixtures("forgotten_openmp")
@pytest.mark.parametrize("name", ["lib é 库".encode(), b"lib\xff"])
def test_openmp_is_found_beside_libraries_of_any_name(tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        Region(compile_regions("marks", emit_marks), "marks")


@pytest.mark.usefixtures("forgotten_openmp")
def test_another_openmp_than_gnus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: "7f00-7f01 r-xp 0 08:01 5 /lib/libomp.so\n")
    with pytest.raises(LinkerError, match="GNU's OpenMP"):
        compile_regions("refused", emit_marks)
    with pytest.raises(LinkerError, match="GNU's OpenMP"):
        CompiledArithmetic()


@pytest.mark.usefixtures("forgotten_openmp")
@pytest.mark.parametrize("place", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-a34b3233.so.1"])
def test_torchs_own_openmp_is_taken_before_another_packages(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    loaded: list[str] = []
    others = "/site/sklearn.libs/libgomp-1.so", "/usr/lib/libgomp.so.1"
    lines = [f"7f00-7f01 r-xp 0 08:01 5 {path}\n" for path in (*others, f"/site/{place}")]
    monkeypatch.setattr(Path, "read_text", lambda *_: "".join(lines))
    monkeypatch.setattr(torch, "__file__", "/site/torch/__init__.py")
    monkeypatch.setattr(regions, "_OpenMP", loaded.append)
    regions._openmp()
    regions._openmp.cache_clear()
    lines.pop()
    regions._openmp()  # a system's torch brings none
    assert loaded == [f"/site/{place}", others[0]]
