"""`linker serve` over the fake engine: the whole command but for the tensors."""

from __future__ import annotations

import functools
import sys

from server.cli import main, serve
from server.gateway.services import build_services
from tests.server.cached_scan import CACHED_SCAN
from tests.server.fake_engine import FAKE_ENGINE

if __name__ == "__main__":
    vars(serve)["build_services"] = functools.partial(
        build_services, engine_command=FAKE_ENGINE, scan_command=CACHED_SCAN
    )
    sys.exit(main.main(["serve", *sys.argv[1:]]))
