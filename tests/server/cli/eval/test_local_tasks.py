"""Task files as lm-eval gets them: where data lies, and what is made of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from linker_core.errors import InvalidRequestError
from server.cli.eval.local_tasks import known_tasks, write_tasks
from server.cli.eval.report import RETENTION_TASKS

MMLU = '"What is 0.50, or ""half""?",0.5,"0,1",4,None,B\n'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "mc").mkdir(parents=True)
    (folder / "mc" / "piqa_val.jsonl").write_text('{"goal": "g"}\n')
    (folder / "mmlu" / "test").mkdir(parents=True)
    for subject in ("high_school_physics", "anatomy"):
        (folder / "mmlu" / "test" / f"{subject}_test.csv").write_text(MMLU)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    return folder


def test_there_is_a_file_for_every_task_of_appendix_d() -> None:
    assert set(RETENTION_TASKS) <= set(known_tasks())


def test_task_names_its_data_where_it_lies(data: Path, target: Path) -> None:
    write_tasks(["piqa"], data, target)
    [written] = target.iterdir()
    task = yaml.safe_load(written.read_text())
    assert task["task"] == "piqa"
    assert task["dataset_path"] == "json"
    found = task["dataset_kwargs"]["data_files"][task["test_split"]]
    assert Path(found) == (data / "mc" / "piqa_val.jsonl").resolve()
    assert not {"data", "columns"} & task.keys()


def test_every_subject_is_a_task_and_their_group_weighs_them_by_size(
    data: Path, target: Path
) -> None:
    write_tasks(["mmlu"], data, target)
    group = yaml.safe_load((target / "mmlu.yaml").read_text())
    assert group["task"] == ["mmlu_anatomy", "mmlu_high_school_physics"]
    assert group["aggregate_metric_list"][0]["weight_by_size"] is True
    physics = yaml.safe_load((target / "mmlu_high_school_physics.yaml").read_text())
    assert physics["description"].endswith("about high school physics.\n\n")
    rows = Path(physics["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    assert [json.loads(row) for row in rows] == [
        {"question": 'What is 0.50, or "half"?', "A": "0.5", "B": "0,1", "C": "4", "D": "None",
         "answer": "B"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "says"),
    [("pika", "there are arc_challenge"), ("hellaswag", "is not there"), ("gsm8k", "is not there")],
)
def test_task_or_data_that_is_missing_is_said(
    data: Path, target: Path, name: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        write_tasks([name], data, target)


def test_folder_without_subjects_is_said(data: Path, target: Path) -> None:
    for path in (data / "mmlu" / "test").iterdir():
        path.unlink()
    with pytest.raises(InvalidRequestError, match="is not there"):
        write_tasks(["mmlu"], data, target)
