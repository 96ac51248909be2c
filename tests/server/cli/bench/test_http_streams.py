from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from linker_core.errors import LinkerError
from server.cli.bench.http_streams import Completion, complete
from tests.server.cli.bench.fake_server import Answers


@pytest.fixture
def url() -> Iterator[str]:
    Answers.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _request(url: str, model: str) -> Completion:
    return Completion(url=url, model=model, prompt="hello", max_tokens=4, extra={"top_k": 1})


def test_streams_are_counted_by_usage_and_timed_by_text(url: str) -> None:
    found = complete([_request(url, "a"), _request(url, "b")])
    assert found.num_tokens == 8
    assert [len(stream) for stream in found.streams] == [4, 4]
    assert all(0 < at <= found.seconds for stream in found.streams for at in stream)
    first = min(Answers.asked, key=lambda body: str(body["model"]))
    assert first == {
        "path": "/v1/completions", "model": "a", "prompt": "hello", "max_tokens": 4,
        "temperature": 0.0, "stream": True, "top_k": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "complaint"), [("unknown", "404"), ("short", "3 tokens instead of 4")]
)
def test_what_is_not_answered_in_full_is_not_counted(url: str, model: str, complaint: str) -> None:
    with pytest.raises(LinkerError, match=complaint):
        complete([_request(url, "a"), _request(url, model)])


def test_a_server_that_is_gone_is_told_of() -> None:
    with pytest.raises(LinkerError, match="broke off"):
        complete([_request("http://127.0.0.1:1", "a")])
