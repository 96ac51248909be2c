"""Benchmarks over files at hand, in lm-eval's own words, so that nothing has to be downloaded.

The task files beside this module ask as lm-eval's tasks of the same names do. They name their data
relative to a folder that the user gives.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from linker_core.errors import InvalidRequestError

_FOLDER = Path(__file__).parent / "tasks"
_SUBJECT = "{subject}"


@cache
def known_tasks() -> tuple[str, ...]:
    """Returns the names of the tasks that there are files for."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def write_tasks(names: Sequence[str], data: Path, target: Path) -> None:
    """Writes the tasks' files as lm-eval reads them.

    Args:
        names: The tasks.
        data: The folder with their data.
        target: An empty folder. What lm-eval cannot read as it is is written there, too.

    Raises:
        InvalidRequestError: There is no such task, or its data is not there.
    """
    for name in names:
        if name not in known_tasks():
            raise InvalidRequestError(
                f"There is no local task {name!r}; there are {', '.join(known_tasks())}. Without "
                "--data, lm-eval's own tasks are used.",
                param="tasks",
            )
        record = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text("utf-8"))
        for stem, task in _expanded(record, data, target).items():
            (target / f"{stem}.yaml").write_text(yaml.safe_dump(task), "utf-8")


def _expanded(record: dict[str, Any], data: Path, target: Path) -> dict[str, dict[str, Any]]:
    """Returns what lm-eval needs for one of our files by name: a task, or a group and its tasks."""
    pattern = record.pop("data")
    if "group" not in record:
        return {record["task"]: _task(record, _existing(data, pattern))}
    group, columns = record.pop("group"), record.pop("columns")
    before, after = Path(pattern).name.split(_SUBJECT)
    folder = _existing(data, str(Path(pattern).parent))
    subjects = sorted(
        path.name.removeprefix(before).removesuffix(after) for path in folder.glob(f"*{after}")
    )
    if not subjects:
        raise _missing(folder / Path(pattern).name)
    tasks: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        name = f"{group}_{subject}"
        said = record["description"].replace(_SUBJECT, subject.replace("_", " "))
        with (folder / f"{before}{subject}{after}").open(encoding="utf-8", newline="") as source:
            rows = _written(csv.DictReader(source, columns), target / f"{name}.jsonl")
        tasks[name] = _task(record | {"task": name, "description": said}, rows)
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    whole = {
        "group": group,
        "task": list(tasks),
        "aggregate_metric_list": [mean],
        "metadata": record["metadata"],
    }
    return tasks | {group: whole}


def _written(rows: Iterable[dict[str, str]], path: Path) -> Path:
    """Writes rows as JSON, in which an answer "0.50" stays the text that it is."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def _task(record: dict[str, Any], path: Path) -> dict[str, Any]:
    reading = {"data_files": {"test": str(path)}}
    return record | {"dataset_path": "json", "dataset_kwargs": reading, "test_split": "test"}


def _existing(data: Path, relative: str) -> Path:
    path = (data / relative).resolve()
    if not path.exists():
        raise _missing(path)
    return path


def _missing(path: Path) -> InvalidRequestError:
    return InvalidRequestError(
        f"{path} is not there. --data names a folder that holds mc/, mmlu/test/ and gsm8k/.",
        param="data",
    )
