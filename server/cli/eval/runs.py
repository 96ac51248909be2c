"""One run of lm-eval against a server, in a process of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linker_core.errors import EngineFailureError, InvalidRequestError
from server.cli.eval.local_tasks import write_tasks
from server.cli.eval.serving import Evaluated
from server.gateway.schemas.generation import VariantMode

_HARNESS = Path(__file__).parent / "harness.py"
_STDERR = 2  # of this process; its stdout is the report's
_PROBE = "import importlib.util as u, sys; sys.exit(u.find_spec('lm_eval') is None)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is asked of a model."""

    tasks: Sequence[str]
    data: Path | None  # where local tasks find theirs; None: lm-eval's own tasks
    limit: int | None  # samples of each task
    num_fewshot: int | None  # None: as the task says
    concurrency: int  # requests at once
    batch: int  # prompts in each
    python: Path  # of an environment that has lm-eval


def check_harness(python: Path) -> None:
    """Refuses an interpreter that has no lm-eval.

    Raises:
        InvalidRequestError: It has none, or is none.
    """
    try:
        found = subprocess.run([python, "-I", "-c", _PROBE], check=False, capture_output=True)
    except OSError as error:
        raise InvalidRequestError(f"{python} cannot be run: {error.strerror}.") from error
    if found.returncode != 0:
        raise InvalidRequestError(
            f"lm-eval is not installed for {python}. pip install '.[eval]' in a clone of this "
            "project, or name an interpreter that has it with --python."
        )


def evaluate(
    model: Evaluated, mode: VariantMode, asked: Evaluation, *, key: str | None
) -> dict[str, Any]:
    """Returns `harness` and `tasks`: what lm-eval says of a model's answers.

    lm-eval's progress goes to stderr.

    Args:
        model: Who answers.
        mode: With which weights.
        asked: The tasks.
        key: Of the server.

    Raises:
        InvalidRequestError: Local tasks that are none, or whose data is not there.
        EngineFailureError: lm-eval gave up, or found no number.
    """
    with tempfile.TemporaryDirectory(prefix="linker-eval-") as folder:
        tasks, output = Path(folder) / "tasks", Path(folder) / "scores.json"
        tasks.mkdir()
        if asked.data is not None:
            write_tasks(asked.tasks, asked.data, tasks)
        request = {
            "model": model.name,
            "base_url": model.base_url,
            "variant_mode": mode,
            "max_length": model.max_model_len,
            "tasks": list(asked.tasks),
            "task_folder": None if asked.data is None else str(tasks),
            "limit": asked.limit,
            "num_fewshot": asked.num_fewshot,
            "concurrency": asked.concurrency,
            "batch": asked.batch,
            "output": str(output),
        }
        done = subprocess.run(
            [asked.python, "-I", _HARNESS],
            input=json.dumps(request),
            text=True,
            stdout=_STDERR,
            env=_environment(asked, Path(folder), key),
            check=False,
        )
        if done.returncode != 0 or not output.exists():
            raise EngineFailureError(
                f"lm-eval ended with status {done.returncode}; what it wrote above says why."
            )
        found: dict[str, Any] = json.loads(output.read_text("utf-8"))
    for said in found["tasks"].values():
        said["is_partial"] = asked.limit is not None
        for kind in ("metrics", "stderr"):
            numbers = said[kind].items()
            said[kind] = {metric: value for metric, value in numbers if math.isfinite(value)}
    # A group without a mean of its own has its tasks alone.
    scored = {task: said for task, said in found["tasks"].items() if said["metrics"]}
    if not scored:
        raise EngineFailureError("lm-eval found no score that is a number.")
    return found | {"tasks": scored}


def _environment(asked: Evaluation, folder: Path, key: str | None) -> dict[str, str]:
    """Returns lm-eval's environment: the key, which no command line shows, and no leftovers."""
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    if key is not None:
        environment["OPENAI_API_KEY"] = key
    if asked.data is not None:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment |= {"HF_DATASETS_CACHE": str(folder / "cache"), **offline}
    return environment
