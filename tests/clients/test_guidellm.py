"""guidellm finds the model by itself and ends a short run without an error."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environments import client_environment, python_of
from tests.clients.programs.scenarios import DONOR
from tests.server.live import LiveServer

pytestmark = pytest.mark.client
REQUESTS, PROMPT_TOKENS, ANSWER_TOKENS = 6, 24, 8


def benchmark(server: LiveServer, tokenizer: Path, report: Path, *, route: str) -> dict[str, Any]:
    """Runs guidellm against the server and returns its only benchmark."""
    target = f"kind=openai_http,target={server.url},request_format={route}"
    lengths = f"prompt_tokens={PROMPT_TOKENS},output_tokens={ANSWER_TOKENS}"
    command = [
        str(python_of("guidellm")), "-m", "guidellm", "run",
        "--backend", target,
        "--profile", "kind=concurrent,streams=2",
        "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--tokenizer", f"kind=hf_auto,model={tokenizer}",
        "--data", f"kind=synthetic_text,{lengths}",
        "--output", f"kind=json,path={report}",
        "--disable-console",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        env=client_environment(),
        cwd=report.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    [only] = json.loads(report.read_text())["benchmarks"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_short_run_has_no_error_and_counts_the_tokens(
    answering: LiveServer, tmp_path: Path, route: str
) -> None:
    tokenizer = answering.served(DONOR).text.path
    found = benchmark(answering, tokenizer, tmp_path / "report.json", route=route)
    metrics = found["metrics"]
    assert metrics["request_totals"]["successful"] == REQUESTS
    assert metrics["request_totals"]["errored"] == metrics["request_totals"]["incomplete"] == 0
    answers = metrics["output_token_count"]["successful"]
    assert (answers["min"], answers["max"], answers["count"]) == (
        ANSWER_TOKENS, ANSWER_TOKENS, REQUESTS,
    )  # fmt: skip
    assert metrics["prompt_token_count"]["successful"]["min"] >= PROMPT_TOKENS
    # The first piece is a token's: what comes before it is what the first token took.
    assert metrics["time_to_first_token_ms"]["successful"]["min"] > 0
    assert metrics["inter_token_latency_ms"]["successful"]["count"] == REQUESTS * (
        ANSWER_TOKENS - 1
    )
