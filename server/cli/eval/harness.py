"""A program of its own that runs lm-eval on a server: the request in on stdin, scores to a file.

It imports lm-eval and nothing of this project, so any environment that has lm-eval can run it. What
it sends is what lm-eval's `local-completions` sends, and says besides whose weights are to answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import evaluator, simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager


class ServedModel(LocalCompletionsAPI):  # type: ignore[misc]
    """A model behind the server, answering with one of its two weights."""

    def __init__(self, variant_mode: str, **options: Any) -> None:
        super().__init__(**options)
        self._variant_mode = variant_mode

    def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(*args, **kwargs)
        return payload | {"variant_mode": self._variant_mode}


def main() -> int:
    """Evaluates; the exit status is lm-eval's."""
    request = json.loads(sys.stdin.read())
    model = ServedModel(
        request["variant_mode"],
        model=request["model"],
        base_url=request["base_url"],
        tokenizer_backend="remote",
        auth_token=os.environ.get("OPENAI_API_KEY"),
        max_length=request["max_length"],
        num_concurrent=request["concurrency"],
        batch_size=request["batch"],
        max_retries=8,
        timeout=3600,
    )
    # It runs git, which complains where there is none, and its answer would be of whoever asks.
    evaluator.get_git_commit_hash = lambda: None
    folder = request["task_folder"]
    found = simple_evaluate(
        model=model,
        tasks=request["tasks"],
        task_manager=TaskManager(include_path=folder, include_defaults=folder is None),
        num_fewshot=request["num_fewshot"],
        limit=request["limit"],
        bootstrap_iters=100,  # only for what has no formula
        log_samples=False,
    )
    Path(request["output"]).write_text(json.dumps(_scores(found)), "utf-8")
    return 0


def _scores(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns each task's metrics, those of a filter but the plain one with its name."""
    tasks: dict[str, Any] = {}
    for task, said in found["results"].items():
        metrics: dict[str, float] = {}
        stderr: dict[str, float] = {}
        for key, value in said.items():
            name, comma, chosen = key.partition(",")
            if not comma or not isinstance(value, int | float):
                continue
            into = stderr if name.endswith("_stderr") else metrics
            name = name.removesuffix("_stderr")
            into[name if chosen == "none" else f"{name},{chosen}"] = float(value)
        counted = found.get("n-samples", {}).get(task, {})
        tasks[task] = {
            "metrics": metrics,
            "stderr": stderr,
            "num_samples": counted.get("effective"),
            "num_fewshot": found.get("n-shot", {}).get(task),
        }
    return {"harness": f"lm-eval {version('lm_eval')}", "tasks": tasks}


if __name__ == "__main__":
    sys.exit(main())
