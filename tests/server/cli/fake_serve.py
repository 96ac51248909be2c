"""`linker serve` over the fake engine: the whole command but for the tensors."""

from __future__ import annotations

import functools
import sys

from server.cli import main, serve
from server.gateway.services import build_services
from tests.server.fake_engine import FAKE_ENGINE

if __name__ == "__main__":
    serve.build_services = functools.partial(  # type: ignore[assignment]
        build_services, engine_command=FAKE_ENGINE
    )
    sys.exit(main.main(["serve", *sys.argv[1:]]))
