"""The environments that `install.sh` makes, and what programs find when they run in them."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
_PROGRAM_S = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """What a program is told; see `Servers` of the programs."""

    answering: str
    echoing: str
    spare: str
    guarded: str
    keys: dict[str, str]
    faults: dict[str, int]


class Findings:
    """What a program's scenarios found, by name."""

    def __init__(self, scenarios: dict[str, dict[str, Any]]) -> None:
        self._scenarios = scenarios

    def __getitem__(self, name: str) -> Any:
        scenario = self._scenarios[name]
        if "failed" in scenario:
            pytest.fail(f"{name} in the client:\n{scenario['failed']}")
        return scenario["found"]


def python_of(name: str) -> Path:
    """Returns the interpreter of an environment; a test without it fails and says what to do."""
    given = os.environ.get("LINKER_CLIENTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(given) if given else cache / "linker" / "clients"
    python = home / name / "bin" / "python"
    if not python.exists():
        pytest.fail(f"There is no environment {name}: run tests/clients/install.sh {name}")
    return python


def run_program(environment: str, program: str, addresses: Addresses) -> Findings:
    """Runs `programs/{program}.py` in an environment until it ends."""
    command = [str(python_of(environment)), "-m", f"tests.clients.programs.{program}"]
    done = subprocess.run(
        [*command, json.dumps(asdict(addresses))],
        cwd=PROJECT,
        env=client_environment(),
        capture_output=True,
        text=True,
        timeout=_PROGRAM_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Findings(json.loads(done.stdout.splitlines()[-1]))


def client_environment() -> dict[str, str]:
    """Returns the variables of a client's process: no proxy, no network, no caller's keys."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    quiet = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it is fetched on import
        "LANGSMITH_TRACING": "false",
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
    }
    return kept | quiet
