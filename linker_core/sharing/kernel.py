"""The scan's compiled loops: found in the user's cache, or compiled once per machine.

Loading takes a twentieth of the time and a quarter of the memory of importing numba. Addresses go
in as integers, and nothing here checks them: the caller keeps the memory alive and long enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from linker_core.errors import LinkerError

logger = logging.getLogger(__name__)

_BUILD_MODULE = "linker_core.sharing.kernel_build"
_BUILD_SOURCE = Path(__file__).with_name("kernel_build.py")
_DIGEST_BYTES = 32
_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}  # all ones: not finite
_ADDRESS = ctypes.c_void_p

Sums = Callable[[int, int, int, int], None]  # a, b, elements, where four float64 go


class Kernels:
    """Compiled loops over raw words; every call lets other threads run."""

    def __init__(self, object_code: bytes) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
        self._engine.finalize_object()
        counter = (ctypes.c_ssize_t, _ADDRESS, ctypes.c_ssize_t, ctypes.c_uint32)
        self._nonfinite = {
            dtype: self._bind("nonfinite_32" if dtype == "F32" else "nonfinite_16", *counter)
            for dtype in _EXPONENTS
        }
        self._sums = {
            (a, b): self._bind(
                f"sums_{a}_{b}", None, _ADDRESS, _ADDRESS, ctypes.c_ssize_t, _ADDRESS
            )
            for a in _EXPONENTS
            for b in _EXPONENTS
        }
        sizes = (ctypes.c_ssize_t, ctypes.c_ssize_t)
        self._equal_rows = self._bind("equal_rows", ctypes.c_ssize_t, _ADDRESS, _ADDRESS, *sizes)
        self._memcmp = ctypes.CDLL(None).memcmp
        self._memcmp.argtypes = (_ADDRESS, _ADDRESS, ctypes.c_size_t)

    def sums(self, donor_dtype: str, variant_dtype: str) -> Sums:
        """Returns the loop that writes <a, b>, |a|², |b|² and |a - b|² of these types.

        float64 throughout, since a float32 sum over 10**7 terms is wrong by as much as the effect
        that is measured; |a - b|² is summed directly, never expanded.
        """
        found: Sums = self._sums[donor_dtype, variant_dtype]
        return found

    def count_nonfinite(self, dtype: str, address: int, count: int) -> int:
        """Returns how many elements are NaN or infinite."""
        return int(self._nonfinite[dtype](address, count, _EXPONENTS[dtype]))

    def count_equal_rows(self, a: int, b: int, *, rows: int, row_bytes: int) -> int:
        """Returns how many rows have the same bytes; `row_bytes` is even."""
        return int(self._equal_rows(a, b, rows, row_bytes // 2))

    def same_bytes(self, a: int, b: int, nbytes: int) -> bool:
        """Returns whether two pieces of memory are equal."""
        return bool(self._memcmp(a, b, nbytes) == 0)

    def _bind(self, name: str, result: Any, *arguments: Any) -> Any:
        address = self._engine.get_function_address(name)
        assert address, name
        return ctypes.CFUNCTYPE(result, *arguments)(address)


@cache
def load_kernels() -> Kernels:
    """Returns this machine's loops; the first call ever takes some seconds to compile them.

    Raises:
        LinkerError: They could not be compiled here.
    """
    cpu, features = host_features()
    digest = hashlib.sha256(_BUILD_SOURCE.read_bytes())
    digest.update(f"{llvmlite.__version__} {cpu} {features}".encode())
    name = f"scan-{digest.hexdigest()[:32]}.o"
    folder = cache_directory()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    code = None
    if _is_private(folder):  # what lies there is run
        code = _read(folder / name)
        if code is None and os.access(folder, os.W_OK):
            code = _build(folder / name)
    if code is None:
        logger.warning("%s is not this user's alone: every scan compiles its loops", folder)
        with tempfile.TemporaryDirectory() as passing:
            code = _build(Path(passing) / name)
    return Kernels(code)


def cache_directory() -> Path:
    """Returns where compiled loops are kept: linker/ under XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path("~/.cache").expanduser())
        except RuntimeError:
            base = os.devnull  # a user without a home has no cache
    return Path(base) / "linker"


def host_features() -> tuple[str, str]:
    """Returns this CPU's name and features, with vectors as wide as it has."""
    return llvm.get_host_cpu_name(), f"{llvm.get_host_cpu_features().flatten()},-prefer-256-bit"


def seal(code: bytes) -> bytes:
    """Returns object code behind its digest, so that a damaged file is noticed."""
    return hashlib.sha256(code).digest() + code


def _is_private(folder: Path) -> bool:
    """Whether nobody else can have put files into a directory."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(path: Path) -> bytes | None:
    try:
        sealed = path.read_bytes()
    except OSError:
        return None
    code = sealed[_DIGEST_BYTES:]
    return code if seal(code) == sealed else None


def _build(path: Path) -> bytes:
    command = [sys.executable, "-P", "-m", _BUILD_MODULE, str(path)]
    cpu, features = host_features()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # numba reads these while it is imported; by itself it prefers vectors of half the width.
        env=os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features},
        text=True,
        check=False,
    )
    code = _read(path)
    if done.returncode or code is None:
        reason = done.stderr.strip().splitlines()
        raise LinkerError(
            f"The scan's loops could not be compiled: {reason[-1] if reason else 'no message'}. "
            "Check the installation of numba."
        )
    return code
