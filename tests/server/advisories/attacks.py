"""How attacks are judged: the answer has the one shape of errors, and others are left in peace."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import httpx

from tests.server.live import LiveServer

# Nothing that tells of the server's insides: traces, places, addresses, names of exceptions.
_INSIDES = re.compile(
    r"Traceback|File \"|/tmp/|/root/|/home/|site-packages|0x[0-9a-f]{6}"
    r"|127\.0\.0\.1|\b[A-Z]\w+(Error|Exception)\b"
)
_MAX_MESSAGE = 1000  # what is echoed of an attack is bounded


def refused(
    response: httpx.Response, status: int, code: str | None = None, *, param: str | None = None
) -> str:
    """Returns the message of an error that has its status and shape and tells of no insides."""
    assert response.status_code == status, response.text[:500]
    record = response.json()
    assert set(record) == {"error"}
    error = record["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert isinstance(message, str)
    assert isinstance(error["code"], str)
    assert len(message) < _MAX_MESSAGE
    assert not _INSIDES.search(message), message
    assert message.isprintable(), repr(message)
    if code is not None:
        assert error["code"] == code, error
    if param is not None:
        assert (error["param"] or "").split(".")[0] == param, error
    if status in (429, 503):
        assert 1 <= int(response.headers["Retry-After"]) <= 120
    return message


class Bystander:
    """Somebody who uses the server for what it is for while it is attacked."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._pid = server.services.engine.pid
        self._models = self._listed()
        self._said = self.ask()

    def ask(self) -> dict[str, Any]:
        """Asks what has one answer, to the bits of its log-probabilities."""
        response = self._server.complete(
            "near", "Once upon", max_tokens=8, temperature=0, logprobs=2, ignore_eos=True
        )
        assert response.status_code == 200, response.text
        return {"choices": response.json()["choices"], "usage": response.json()["usage"]}

    def check(self) -> None:
        """Fails where anything is different from before the attack."""
        server = self._server
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/ready").status_code == 200
        assert server.services.engine.pid == self._pid, "the engine was restarted"
        assert self._listed() == self._models
        assert self.ask() == self._said
        self._check_idle()

    def _listed(self) -> list[str]:
        return [model["id"] for model in self._server.client.get("/v1/models").json()["data"]]

    def _check_idle(self) -> None:
        """No sequence of an attack runs on."""
        server = self._server
        for name in self._models:
            line = f'linker_num_requests_running{{model="{name}"}}'
            server.until(lambda line=line: server.metric(line) == 0)  # type: ignore[misc]


def post(server: LiveServer, path: str, body: str | bytes, **headers: str) -> httpx.Response:
    """Posts bytes as they are."""
    headers = {"Content-Type": "application/json", **headers}
    return server.client.post(path, content=body, headers=headers)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Returns the header and the data of a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(file: Path, header: str | dict[str, Any], body: bytes) -> None:
    """Writes a safetensors file whose header may be anything."""
    text = header if isinstance(header, str) else json.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + body)


def edit_json(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
