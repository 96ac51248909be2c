"""`linker serve` on one core, with the stand-in engine on another: `… CORE ENGINE_CORE OPTIONS`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial

from server.cli.serve import serve_until_stopped
from server.cli.serve_options import add_arguments, settings_from, startup_requests
from server.gateway.services import build_services

_ENGINE = "server.cli.bench.runners.gateway_engine"


def main() -> int:
    """Serves until a signal; returns the exit status."""
    core, engine_core, *options = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    settings = settings_from(parser.parse_args(options))
    command = (sys.executable, "-P", "-m", _ENGINE, "--core", engine_core)
    return serve_until_stopped(
        settings,
        startup_requests(settings),
        build=partial(build_services, engine_command=command),
    )


if __name__ == "__main__":
    sys.exit(main())
