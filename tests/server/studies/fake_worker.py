"""A study worker without weights: it speaks the protocol, and ends as it is told.

Beside the base's weights lie what it was asked (`LOG`, a JSON line each time) and how it is to
behave (`Behaviour`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from linker_core.lifeline import die_with_parent
from linker_core.weights.checkpoint import Checkpoint

FAKE_STUDY = (sys.executable, "-m", "tests.server.studies.fake_worker")
TENSORS = tuple(f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1, 2, 10))
_LOG, _BEHAVIOUR = "studies.log", "study-behaviour.json"
End = Literal["result", "wait", "SIGKILL", "SIGBUS", "exit", "cut", "nonsense", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How one worker behaves."""

    records: int = len(TENSORS)  # of tensors that were not done, before it ends
    end: End = "result"
    error: str = "bad_checkpoint"  # code, of the end of that name
    variant: str | None = None  # that the error is about, and without which there is none

    def tell(self, base: Path) -> None:
        """Has the workers of a base behave so from now on."""
        file = base / _BEHAVIOUR
        file.with_suffix(".new").write_text(json.dumps(asdict(self)))
        file.with_suffix(".new").replace(file)


def requests(base: Path) -> list[dict[str, Any]]:
    """Returns what workers were asked, and their processes' ids, in order."""
    log = base / _LOG
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def record_of(name: str) -> dict[str, Any]:
    return {"name": name, "pc1": 0.5}


def summary_of(request: Mapping[str, Any]) -> dict[str, Any]:
    return {"base": request["base"]["name"], "variants": {n: {} for n in request["variants"]}}


def main() -> None:
    request = json.loads(sys.stdin.readline())
    request["done"] = [json.loads(sys.stdin.readline()) for _ in range(request["num_done"])]
    base = Path(request["base"]["path"])
    with (base / _LOG).open("a") as log:
        log.write(json.dumps(request | {"pid": os.getpid()}) + "\n")
    file = base / _BEHAVIOUR
    behaviour = Behaviour(**json.loads(file.read_text())) if file.exists() else Behaviour()
    say(
        {
            "opened": {
                "base": identity(base),
                "variants": {n: identity(Path(p)) for n, p in request["variants"].items()},
                "num_tensors": len(TENSORS),
            }
        }
    )
    if behaviour.variant not in (None, *request["variants"]):
        behaviour = Behaviour()
    done = {record["name"] for record in request["done"]}
    for name in [name for name in TENSORS if name not in done][: behaviour.records]:
        say({"record": record_of(name), "spent": [0.25, 0.125, 1.0, 0.5]})
    finish(behaviour, request)


def finish(behaviour: Behaviour, request: Mapping[str, Any]) -> None:
    match behaviour.end:
        case "result":
            say({"result": summary_of(request)})
        case "wait":
            time.sleep(600)
        case "SIGKILL":
            os.kill(os.getpid(), 9)
        case "SIGBUS":
            os.kill(os.getpid(), 7)
        case "exit":
            sys.exit(3)
        case "cut":
            sys.stdout.write('{"record": {"na')
        case "nonsense":
            say({"record": 3})
            time.sleep(600)
        case "error":
            param = behaviour.variant and f"variants.{behaviour.variant}"
            say({"error": {"code": behaviour.error, "message": "That is why.", "param": param}})
            sys.exit(1)


def identity(path: Path) -> Any:
    with Checkpoint.open(path) as checkpoint:
        return checkpoint.identity


def say(record: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    die_with_parent()
    main()
