"""Runs lm-eval as its own command line would, and says what came of every single sample.

The request comes on stdin and the findings go to a file: lm-eval writes to both other streams.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast


def main() -> None:
    """Evaluates one model in all of the request's tasks."""
    request = json.loads(sys.stdin.read())
    if request["model"] == "hf":
        request["model_args"]["tokenizer"] = _tokenizer(Path(request["model_args"]["pretrained"]))
    found = simple_evaluate(
        model=request["model"],
        model_args=request["model_args"],
        batch_size=request["batch"],
        tasks=request["tasks"],
        task_manager=TaskManager(include_path=request["tasks_in"], include_defaults=False),
        limit=request["limit"],
        gen_kwargs=request["gen_kwargs"],
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {task: [_answers(one) for one in rows] for task, rows in found["samples"].items()}
    findings = {"results": found["results"], "samples": samples}
    Path(request["output"]).write_text(json.dumps(findings, default=str))


def _tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    """Returns a checkpoint's tokenizer as its file says.

    `AutoTokenizer` takes the class of the architecture, which splits digits whatever the file says.
    """
    said = json.loads((checkpoint / "tokenizer_config.json").read_text())
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(checkpoint / "tokenizer.json"),
        eos_token=said["eos_token"],
        pad_token=said["pad_token"],
    )
    return made


def _answers(sample: dict[str, Any]) -> list[Any]:
    """Returns what the model said: a text, or a log-likelihood and whether it is the likeliest."""
    return [response[0] for response in sample["resps"]]


if __name__ == "__main__":
    main()
