"""`linker serve`, with faults where a control file says, and its workers out of the nursery."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import server.cli.serve
import server.gateway.services
from server.bridge.supervisor import SupervisionLimits
from server.cli.main import main as linker
from server.gateway.services import build_services
from server.onboarding.hub.hub import Hub
from tests.server.crash import stand_in
from tests.server.crash.faults import SERVER, install

_LIMITS = SupervisionLimits(poll_s=0.05, backoff_s=0.01, max_crashes=1000)


def main() -> int:
    """Serves with this process's command line; returns the exit status."""
    vars(server.cli.serve)["build_services"] = partial(
        build_services,
        engine_command=_command("linker_core.engine.worker"),
        scan_command=_command("linker_core.sharing.worker"),
        tune_command=_command("tests.server.fake_tuner"),
        encode_command=_command("linker_core.residency.worker"),
        limits=_LIMITS,
    )
    hub = partial(Hub, command=_command("server.onboarding.hub.worker"), retry_wait_s=0.01)
    vars(server.gateway.services)["Hub"] = hub
    return linker(["serve", *sys.argv[1:]])


def _command(module: str) -> tuple[str, ...]:
    if stand_in.ADDRESS in os.environ:
        return (sys.executable, "-I", "-S", str(Path(stand_in.__file__)), module)
    return (sys.executable, "-P", "-m", module)


if __name__ == "__main__":
    install(SERVER)
    sys.exit(main())
