"""Thousands of requests made up from /openapi.json, alone and in sequences: none is a 5xx."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.registry.records import Role
from tests.clients.environments import PROJECT, client_environment, python_of
from tests.server.keyed import client_of, give_key
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

pytestmark = [pytest.mark.client, pytest.mark.timeout(900)]

AT_LEAST = 5000
EXAMPLES_PER_ROUTE = 220
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance", "ignored_auth",
)  # fmt: skip
ENDLESS = "/models/events"  # a stream that ends with the server


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, str]]:
    """A server with keys, over the fake engine, and an operator's key."""
    root, state = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("state")
    make_variant(root / "near", make_checkpoint(root / "base"), scale=0.01)
    key = give_key(state, Role.ADMIN).key
    models = {"base": root / "base", "near": root / "near"}
    with live_server(state, models=models, root=root) as live:
        live.client.headers["Authorization"] = f"Bearer {key}"
        live.until_ready()
        yield live, key


def answer(client: httpx.Client) -> object:
    body = {"model": "near", "prompt": "Once", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def test_no_request_of_the_description_is_a_server_error(
    attacked: tuple[LiveServer, str], tmp_path: Path
) -> None:
    server, key = attacked
    pid = server.services.engine.pid
    with client_of(server, key) as operator:
        said = answer(operator)
        report = tmp_path / "report.json"
        command = [
            str(python_of("schemathesis").with_name("st")),
            "--config-file", str(PROJECT / "tests/clients/programs/schemathesis.toml"),
            "run", f"{server.url}/openapi.json",
            "--header", f"Authorization: Bearer {key}",
            "--checks", ",".join(CHECKS),
            "--exclude-path", ENDLESS,
            "--max-examples", str(EXAMPLES_PER_ROUTE),
            "--suppress-health-check", "all",
            "--generation-database", "none",
            "--seed", "7", "--no-shrink", "--continue-on-failure", "--no-color",
            "--report", "json", "--report-json-path", str(report),
        ]  # fmt: skip
        hooks = "tests.clients.programs.schemathesis_hooks"
        done = subprocess.run(
            command,
            cwd=tmp_path,  # where it leaves what it remembers
            env=client_environment() | {"SCHEMATHESIS_HOOKS": hooks, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            timeout=840,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert json.loads(report.read_text())
        generated = re.search(r"(\d[\d,]*) generated", done.stdout)
        assert generated is not None, done.stdout[-2000:]
        assert int(generated[1].replace(",", "")) >= AT_LEAST
        # Afterwards it is the same server as before.
        assert answer(operator) == said
        assert server.services.engine.pid == pid
        assert operator.get("/ready").status_code == 200
