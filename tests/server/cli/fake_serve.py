"""`linker serve` over the fake engine: the whole command but for the tensors."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from pathlib import Path

from server.cli import main, serve
from server.gateway import completions
from server.gateway.completions import CompletionAnswer
from server.gateway.services import build_services
from server.onboarding.last_use import LastUse
from tests.server.cached_scan import CACHED_SCAN

ENGINE_VARIABLE = "LINKER_TEST_ENGINE"  # the engine's command line as JSON
BREAK_VARIABLE = "LINKER_TEST_BREAK_AT"  # a file; once it exists, a background task fails
QUOTE_VARIABLE = "LINKER_TEST_QUOTE"  # if it is set, every completion meets a fault of ours


class Quoting(CompletionAnswer):
    """Fails as code does that names what it was given."""

    def prepare(self) -> None:
        raise KeyError(self._request.prompt)


async def _break_at(path: Path) -> None:
    while not path.exists():
        await asyncio.sleep(0.02)
    raise RuntimeError("a background task is broken on purpose")


if __name__ == "__main__":
    vars(serve)["build_services"] = functools.partial(
        build_services,
        engine_command=json.loads(os.environ[ENGINE_VARIABLE]),
        scan_command=CACHED_SCAN,
    )
    if BREAK_VARIABLE in os.environ:
        sign = Path(os.environ[BREAK_VARIABLE])
        setattr(LastUse, "flush", lambda _self: _break_at(sign))  # noqa: B010
    if QUOTE_VARIABLE in os.environ:
        vars(completions)["CompletionAnswer"] = Quoting
    sys.exit(main.main(["serve", *sys.argv[1:]]))
