from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from linker_core.errors import LinkerError
from server.cli.bench.admission import _serving, _wait_until_ready
from tests.tiny import make_checkpoint


def test_donor_that_cannot_be_onboarded_ends_the_benchmark_with_the_reason(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    (donor / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(LinkerError, match="onboarding donor failed"), _serving(donor, donor):
        pass


def test_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("starting\n12:00 WARNING slow\nstill starting\n")
    transport = httpx.MockTransport(lambda _request: httpx.Response(503))
    sleep = (sys.executable, "-c", "import sys; sys.stdin.read()")
    with (
        httpx.Client(base_url="http://server", transport=transport) as client,
        subprocess.Popen(sleep, stdin=subprocess.PIPE) as process,
        pytest.raises(LinkerError, match=r"not ready in 0 s\. 12:00 WARNING slow"),
    ):
        _wait_until_ready(client, process, log, timeout_s=0)
