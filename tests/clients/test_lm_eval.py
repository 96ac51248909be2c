"""lm-eval against the server says what it says of the same checkpoint in its own process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.cli.eval.local_tasks import write_tasks
from server.cli.main import main
from tests.clients.environments import PROJECT, client_environment, python_of
from tests.server.live import LiveServer, live_server

pytestmark = [pytest.mark.client, pytest.mark.shared]

TOLERANCE = 1e-3
LIKELIHOODS = ("piqa", "arc_challenge", "hellaswag", "winogrande", "mmlu_astronomy")
GENERATION = "gsm8k"
LIMIT = 6
GEN_KWARGS = {"max_gen_toks": 40}
NAME = "acme/math"
SHARED: dict[str, Any] = {"policy": "thresholds", "tau_cos": 0.9, "tau_frob": 0.2}


@pytest.fixture(scope="module")
def family(shared: Path) -> Path:
    return shared / "families" / "mini-qwen2"


@pytest.fixture(scope="module")
def live(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The real engine with a donor and a variant whose blocks are all the donor's."""
    with live_server(tmp_path_factory.mktemp("state"), root=family, engine_command=None) as server:
        server.until(lambda: server.client.get("/health").is_success)
        server.onboard("base", family / "base").raise_for_status()
        server.onboard(NAME, family / "math", donor="base", **SHARED).raise_for_status()
        yield server


@pytest.fixture(scope="module")
def tasks_in(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    names = [*(task for task in LIKELIHOODS if not task.startswith("mmlu")), "mmlu", GENERATION]
    write_tasks(names, shared / "data", folder)
    return folder


@pytest.fixture(scope="module")
def references(
    family: Path, tasks_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What lm-eval says of two checkpoints that transformers runs in its process, in float32."""
    found = {}
    for name in ("base", "math"):
        said = {"pretrained": str(family / name), "dtype": "float32", "device": "cpu"}
        folder = tmp_path_factory.mktemp(name)
        found[name] = evaluate(folder, tasks_in, model="hf", model_args=said, batch=1)
    return found


def evaluate(
    folder: Path, tasks_in: Path, *, model: str, model_args: Mapping[str, Any], batch: int
) -> dict[str, Any]:
    """Runs lm-eval's own program code in its environment."""
    request = {
        "model": model,
        "model_args": dict(model_args),
        "batch": batch,
        "tasks": [*LIKELIHOODS, GENERATION],
        "tasks_in": str(tasks_in),
        "limit": LIMIT,
        "gen_kwargs": GEN_KWARGS,
        "output": str(folder / "found.json"),
    }
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [python_of("lm_eval"), "-m", "tests.clients.programs.lm_eval_samples"],
        input=json.dumps(request),
        cwd=PROJECT,
        env=client_environment() | offline,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def metrics(results: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Returns every metric of every task, without errors of estimation."""
    return {
        (task, name): value
        for task, said in results.items()
        for name, value in said.items()
        if "," in name and "stderr" not in name and isinstance(value, int | float)
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 3, "num_concurrent": 2}])
def test_local_completions_equals_a_run_of_transformers(
    live: LiveServer,
    references: dict[str, Any],
    tasks_in: Path,
    tmp_path: Path,
    options: dict[str, int],
) -> None:
    said = {
        "model": "base",
        "base_url": f"{live.url}/m/base/v1/completions",
        "tokenizer_backend": "remote",
        "max_length": 1024,
        "num_concurrent": options.get("num_concurrent", 1),
    }
    found = evaluate(
        tmp_path, tasks_in, model="local-completions", model_args=said, batch=options["batch"]
    )
    expected = references["base"]
    assert metrics(found["results"]) == pytest.approx(metrics(expected["results"]), abs=TOLERANCE)
    assert found["samples"].keys() == {*LIKELIHOODS, GENERATION}
    for task in LIKELIHOODS:
        for ours, theirs in zip(found["samples"][task], expected["samples"][task], strict=True):
            likelihoods = [answer[0] for answer in ours]
            assert likelihoods == pytest.approx([answer[0] for answer in theirs], abs=TOLERANCE)
            assert [answer[1] for answer in ours] == [answer[1] for answer in theirs]
    assert found["samples"][GENERATION] == expected["samples"][GENERATION]


@pytest.mark.timeout(900)
def test_linker_eval_of_unshared_weights_scores_as_the_checkpoint_and_of_shared_ones_does_not(
    live: LiveServer, references: dict[str, Any], shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = metrics(references["math"]["results"])
    found = {}
    for mode in ("unshared", "planned"):
        tasks = ["piqa", "arc_challenge", "hellaswag", "winogrande"]
        said = linker_eval(live, shared, capsys, "--variant-mode", mode, tasks=tasks)
        assert said["harness"] == "lm-eval 0.4.13"
        found[mode] = {
            (task, f"{metric},none"): value
            for task, record in said["tasks"].items()
            for metric, value in record["metrics"].items()
        }
        stored = live.client.get(f"/models/{NAME}").json()["scores"][mode]
        assert {task: record["metrics"] for task, record in stored.items()} == {
            task: record["metrics"] for task, record in said["tasks"].items()
        }
    assert found["unshared"] == pytest.approx(
        {key: expected[key] for key in found["unshared"]}, abs=TOLERANCE
    )
    assert found["planned"] != pytest.approx(found["unshared"], abs=TOLERANCE)


@pytest.mark.timeout(900)
def test_retention_compares_both_weights_and_marks_what_is_lost(
    live: LiveServer, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = linker_eval(live, shared, capsys, "--retention", tasks=["arc_challenge", "piqa"])
    assert [cell["task"] for cell in said["cells"]] == ["arc_challenge", "piqa"]
    scores = live.client.get(f"/models/{NAME}").json()["scores"]
    for cell in said["cells"]:
        task, metric = cell["task"], cell["metric"]
        assert cell["shared"] == scores["planned"][task]["metrics"][metric]
        assert cell["unshared"] == scores["unshared"][task]["metrics"][metric]
        assert cell["is_low"] == (cell["unshared"] > 0 and cell["retained"] < 0.94)


def linker_eval(
    live: LiveServer,
    shared: Path,
    capsys: pytest.CaptureFixture[str],
    *options: str,
    tasks: list[str],
) -> Any:
    """Runs the command and returns what it prints as JSON."""
    command = ["eval", NAME, "--url", live.url, "--tasks", ",".join(tasks), "--json", *options]
    local = ["--data", str(shared / "data"), "--limit", str(LIMIT)]
    assert main([*command, *local, "--python", str(python_of("lm_eval"))]) == 0
    return json.loads(capsys.readouterr().out)
