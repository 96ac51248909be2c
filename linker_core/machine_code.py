"""Code compiled for this machine: made once, kept in the user's cache, loaded through llvmlite.

What lies in the cache is run, so it is read only from a folder that nobody else can write, and
behind a digest that shows a damaged file.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from linker_core.errors import LinkerError

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_NAMED_DIGITS = 32  # of a file's name: what it was built from
_KEPT_S = 30 * 24 * 3600.0  # how long a file is kept that nothing loads


def cached_code(name: str, *, sources: bytes, build: Callable[[], bytes]) -> bytes:
    """Returns object code from the cache, or builds it and keeps it there if it can.

    Args:
        name: What it is, as a part of a file name.
        sources: Whatever decides what is built, besides this machine and llvmlite.
        build: Compiles it.
    """
    digest = hashlib.sha256(sources)
    digest.update(Path(__file__).read_bytes())  # how it is compiled
    digest.update(f"{llvmlite.__version__} {host_features()}".encode())
    folder = code_directory()
    path = folder / f"{name}-{digest.hexdigest()[:_NAMED_DIGITS]}.o"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        logger.warning("%s is compiled at every start, for want of a cache: %s", name, error)
        return build()
    if not _is_private(folder):
        logger.warning("%s is not this user's alone: %s is compiled at every start", folder, name)
        return build()
    code = _read(path)
    if code is None:
        code = build()
        try:
            _write(path, seal(code))
            _drop_old(folder, name)
        except OSError as error:  # a full disk, or a folder that is read only
            logger.warning("%s is compiled at every start, for want of a cache: %s", name, error)
    return code


def load_code(code: bytes) -> Any:
    """Returns llvmlite's engine over object code; addresses hold as long as it lives."""
    _initialize()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def compile_module(text: str) -> bytes:
    """Returns the object code of a module's text for this machine, optimised.

    Nothing is reordered that the text does not allow to be.
    """
    machine = target_machine()
    module = llvm.parse_assembly(text)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    code: bytes = machine.emit_object(module)
    return code


def build_apart(module: str) -> bytes:
    """Returns what a module that compiles with numba writes, run in a process of its own.

    Args:
        module: Its name; its one argument is the file to write.

    Raises:
        LinkerError: It could not compile here.
    """
    cpu, features = host_features()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # numba reads these while it is imported; else its vectors are half as wide.
            env=os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features},
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return path.read_bytes()
    reason = done.stderr.strip().splitlines()
    raise LinkerError(
        f"Loops could not be compiled: {reason[-1] if reason else 'no message'}. "
        "Check the installation of numba."
    )


def target_machine() -> Any:
    """Returns llvmlite's target of code for this CPU, to be loaded by `load_code`."""
    _initialize()
    cpu, features = host_features()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="static", codemodel="jitdefault", jit=True
    )


def code_directory() -> Path:
    """Returns where compiled code is kept, a folder that nothing else makes."""
    return cache_directory() / "code"


def cache_directory() -> Path:
    """Returns the user's cache of this program: linker/ under XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(base).is_absolute():  # the XDG rules say that a relative path is to be ignored
        try:
            base = str(Path("~/.cache").expanduser())
        except RuntimeError:
            base = os.devnull  # a user without a home has no cache
    return Path(base) / "linker"


def host_features() -> tuple[str, str]:
    """Returns this CPU's name and features, with vectors as wide as it has."""
    features = llvm.get_host_cpu_features().flatten()
    if llvm.get_process_triple().startswith("x86_64"):  # LLVM takes half of some, unless told
        features += ",-prefer-256-bit"
    return llvm.get_host_cpu_name(), features


def seal(code: bytes) -> bytes:
    """Returns object code behind its digest, so that a damaged file is noticed."""
    return hashlib.sha256(code).digest() + code


def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _is_private(folder: Path) -> bool:
    """Whether nobody else can have put files into a directory."""
    status = folder.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(path: Path) -> bytes | None:
    try:
        sealed = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a folder that is read only is never cleared
        os.utime(path)  # it is in use
    code = sealed[_DIGEST_BYTES:]
    return code if seal(code) == sealed else None


def _write(path: Path, sealed: bytes) -> None:
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(sealed)
        Path(unfinished).replace(path)
    except OSError:
        Path(unfinished).unlink()
        raise


def _drop_old(folder: Path, name: str) -> None:
    """Removes what other sources, versions and CPUs left under a name, if it is long unused."""
    stale_s = time.time() - _KEPT_S
    for path in folder.glob(f"{name}-{'[0-9a-f]' * _NAMED_DIGITS}.o*"):  # unfinished ones, too
        with contextlib.suppress(FileNotFoundError):  # another process clears it at once
            if path.stat().st_mtime < stale_s:
                path.unlink()
