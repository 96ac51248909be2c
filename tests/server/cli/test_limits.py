"""`linker serve` without file descriptors, and without an engine that lives."""

from __future__ import annotations

import resource
import socket
import threading
from pathlib import Path

import httpx
import psutil

from tests.server.cli.test_serve import DEADLINE_S, serving


def test_server_without_file_descriptors_does_not_spin_and_recovers(
    tmp_path: Path, family: Path
) -> None:
    with serving(tmp_path, "--model", f"base={family / 'base'}") as served:
        served.until_ready()
        process = psutil.Process(served.process.pid)
        _, most = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds() + 4, most))
        address = ("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
        num_lines = len(served.log)
        crowd = [socket.create_connection(address) for _ in range(100)]
        # Some of the crowd are served: the rest wait, or are hung up on.
        crowd[0].settimeout(DEADLINE_S)
        crowd[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert crowd[0].recv(1000).startswith(b"HTTP/1.1 200 ")
        for client in crowd:
            client.close()
        body = {"model": "base", "prompt": [50], "max_tokens": 2}
        url = f"{served.url}/v1/completions"
        answer = httpx.post(url, json=body, timeout=DEADLINE_S, trust_env=False)
        assert answer.status_code == 200
        assert len(served.log) - num_lines < 50, served.log[num_lines:][:20]


def test_engine_that_never_lives_ends_the_server_with_status_1(tmp_path: Path) -> None:
    with serving(tmp_path, engine=("false",)) as served:
        ended = threading.Thread(target=served.process.wait, args=(DEADLINE_S,))
        ended.start()
        ended.join(DEADLINE_S)
        assert served.ends() == 1
        assert any("the engine died too often" in line for line in served.log)
