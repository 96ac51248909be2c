"""`linker eval` against a live server, with a program in lm-eval's place that scores at once."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.cli.main import EXIT_USAGE, main
from server.registry.records import Role
from tests.server.keyed import give_key
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

# Scores every task with 0.5, or less under a plan; leaves what it was asked beside itself.
STAND_IN = """\
import json, os, sys
if "-c" in sys.argv:
    sys.exit({status})
request = json.loads(sys.stdin.read())
asked = {{"request": request, "argv": sys.argv, "key": os.environ.get("OPENAI_API_KEY"),
          "offline": os.environ.get("HF_HUB_OFFLINE")}}
with open({log!r}, "a") as log:
    log.write(json.dumps(asked) + "\\n")
if request["limit"] == 13:
    sys.exit("thirteen")
score = 0.5 if request["variant_mode"] == "unshared" else 0.4
said = {{"metrics": {{"acc": score, "acc_norm": score}}, "stderr": {{}}, "num_samples": 7,
        "num_fewshot": 0}}
tasks = dict.fromkeys(request["tasks"], said)
if "none" in tasks:
    tasks["none"] = {{"metrics": {{}}, "stderr": {{}}}}
if tasks.pop("a_tag", None):
    lost = {{"acc": float("nan")}}
    tasks |= {{"first": said | {{"metrics": {{"pass@1,none": score}}}}, "second": said,
              "lost": said | {{"metrics": lost}}, "group": said | {{"metrics": {{}}}}}}
with open(request["output"], "w") as output:
    json.dump({{"harness": "stand-in 1", "tasks": tasks}}, output)
print("noise")
"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("evaluated")
    base = make_checkpoint(root / "base")
    make_variant(root / "near", base, scale=0.01)
    with live_server(root / "state", models={"base": base}, root=root) as server:
        server.until_ready()
        for name in ("near", "acme/near"):
            assert server.onboard(name, root / "near", donor="base").status_code == 201
        yield server


class Harness:
    """A program that takes lm-eval's place."""

    def __init__(self, folder: Path, *, status: int = 0) -> None:
        self._log = folder / "asked.jsonl"
        program = folder / "stand_in.py"
        program.write_text(STAND_IN.format(log=str(self._log), status=status))
        self.path = folder / "python"
        self.path.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    @property
    def asked(self) -> list[dict[str, Any]]:
        if not self._log.exists():
            return []
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def run(live: LiveServer, harness: Harness, *options: str) -> int:
    command = ["eval", *options, "--python", str(harness.path)]
    return main([*command, *([] if "--url" in options else ["--url", live.url])])


def test_scores_are_printed_and_stored_beside_the_plan(
    live: LiveServer, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(live, harness, "acme/near", "--tasks", "piqa,boolq", "--limit", "7") == 0
    printed = capsys.readouterr().out
    assert "noise" not in printed
    assert "boolq" in printed
    assert "0.4000" in printed
    stored = live.client.get("/models/acme/near").json()["scores"]["planned"]
    assert stored["piqa"]["metrics"]["acc"] == 0.4
    assert stored["piqa"]["is_partial"] is True
    [asked] = harness.asked
    assert asked["request"]["base_url"] == f"{live.url}/m/acme/near/v1/completions"
    served = live.client.get("/v1/models/acme/near").json()
    assert asked["request"]["max_length"] == served["max_model_len"]
    assert asked["request"]["task_folder"] is None
    assert asked["offline"] is None


def test_retention_asks_both_weights_and_marks_what_is_low(
    live: LiveServer, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(live, harness, "near", "--retention") == 0
    printed = capsys.readouterr().out
    assert printed.count("* below 94%") == 4
    assert [asked["request"]["variant_mode"] for asked in harness.asked] == ["unshared", "planned"]
    scores = live.client.get("/models/near").json()["scores"]
    assert scores["retention"]["mmlu"]["acc"] == pytest.approx(0.8)


def test_retention_of_a_donor_is_measured_once(
    live: LiveServer, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(live, harness, "base", "--retention", "--tasks", "piqa", "--json") == 0
    [cell] = json.loads(capsys.readouterr().out)["cells"]
    assert cell["retained"] == 1.0
    assert len(harness.asked) == 1


def test_retention_of_a_variant_that_shares_equal_bits_alone_is_measured_once(
    live: LiveServer, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    root = live.services.settings.models.root
    assert root is not None
    sharing: dict[str, Any] = {"policy": "thresholds", "tau_cos": 1.0, "tau_frob": 0.0}
    response = live.onboard("apart", root / "near", donor="base", **sharing)
    assert response.status_code == 201, response.text
    assert response.json()["plan"]["lossless"]
    assert not live.client.get("/models/near").json()["plan"]["lossless"]
    assert run(live, harness, "apart", "--retention", "--tasks", "piqa", "--json") == 0
    [cell] = json.loads(capsys.readouterr().out)["cells"]
    assert cell["retained"] == 1.0
    assert len(harness.asked) == 1


@pytest.mark.parametrize("options", [(), ("--retention",)])
def test_name_of_several_tasks_shows_and_stores_those_that_have_a_score(
    live: LiveServer,
    harness: Harness,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
) -> None:
    assert run(live, harness, "acme/near", "--tasks", "a_tag,piqa", *options) == 0
    printed = capsys.readouterr().out
    assert all(task in printed for task in ("first", "pass@1", "second", "piqa"))
    stored = live.client.get("/models/acme/near").json()["scores"]["planned"]
    assert stored["first"]["metrics"] == {"pass@1,none": 0.4}
    assert not {"a_tag", "lost", "group"} & stored.keys()


def test_local_data_is_given_and_nothing_is_downloaded(
    live: LiveServer, harness: Harness, tmp_path: Path
) -> None:
    (tmp_path / "mc").mkdir()
    (tmp_path / "mc" / "piqa_val.jsonl").write_text("{}\n")
    options = ("near", "--tasks", "piqa", "--data", str(tmp_path))
    assert run(live, harness, *options) == 0
    [asked] = harness.asked
    assert asked["offline"] == "1"
    assert not Path(asked["request"]["task_folder"]).exists()


def test_key_reaches_the_server_and_lm_eval_but_no_command_line(
    tmp_path: Path, live: LiveServer, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = live.services.settings.models.root
    assert root is not None
    key = give_key(tmp_path / "state", Role.ADMIN).key
    with live_server(tmp_path / "state", models={"base": root / "base"}) as guarded:
        guarded.until_ready()
        options = ("base", "--tasks", "piqa", "--url", guarded.url)
        assert run(live, harness, *options) == EXIT_USAGE
        monkeypatch.setenv("LINKER_API_KEY", key)
        assert run(live, harness, *options) == 0
    [asked] = harness.asked
    assert asked["key"] == key
    assert key not in json.dumps([asked["argv"], asked["request"]])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("near",), "Say --tasks"),
        (("near", "--retention", "--variant-mode", "planned"), "both weights"),
        (("no/such", "--tasks", "piqa"), "no/such"),
        (("near", "--tasks", "piqa", "--url", "http://127.0.0.1:1"), "no server"),
        (("near", "--tasks", "piqa", "--data", "/nowhere"), "/nowhere"),
        (("near", "--tasks", "piqa", "--limit", "13"), "ended with status"),
        (("near", "--tasks", "none"), "no score"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    live: LiveServer,
    harness: Harness,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    says: str,
) -> None:
    before = live.client.get("/models/near").json()["scores"]
    assert run(live, harness, *options) == EXIT_USAGE
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert live.client.get("/models/near").json()["scores"] == before


def test_interpreter_without_lm_eval_is_said(
    live: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = Harness(tmp_path, status=1)
    assert run(live, without, "near", "--tasks", "piqa") == EXIT_USAGE
    assert "pip install '.[eval]'" in capsys.readouterr().err
    assert without.asked == []
