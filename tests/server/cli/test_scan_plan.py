"""The JSON that tools rely on: one document on stdout, nothing else; errors are one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli.main import main
from tests.tiny import make_checkpoint, make_variant

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    donor = make_checkpoint(tmp_path / "d")
    return str(donor), str(make_variant(tmp_path / "v", donor, scale={UP: 0.9}))


def test_scan_json_is_one_document(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", *pair, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["donor"], report["variant"]) == pair
    assert [block["index"] for block in report["blocks"]] == [0, 1]
    param = report["blocks"][1]["params"]["mlp.up_proj.weight"]
    assert param["epsilon"] == pytest.approx(0.9, abs=0.01)
    assert param["identical"] is False


def test_scan_table_names_the_farthest_sub_parameter(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", *pair]) == 0
    assert "mlp.up_proj.weight" in capfd.readouterr().out


def test_scan_of_a_sample_has_bounds_and_says_what_it_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    donor = make_checkpoint(tmp_path / "d", hidden=64, intermediate=640, vocab_size=600)
    pair = [str(donor), str(make_variant(tmp_path / "v", donor, scale=0.02))]
    sample = ["--sample", "0.01", "--tau-cos", "0.99", "--tau-frob", "0.05"]
    assert main(["scan", *pair, *sample, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    low, high = report["blocks"][0]["bounds"]["epsilon"]
    assert low < report["blocks"][0]["epsilon"] < high < 0.05
    assert report["sample"]["whole_blocks"] == []
    assert report["sample"]["level"] == 0.99
    assert main(["scan", *pair, *sample]) == 0
    assert "only in what was read" in " ".join(capfd.readouterr().out.split())


def test_plan_json_has_bytes_and_rungs(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *pair, "--tau-cos", "0.99", "--tau-frob", "0.05", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["blocks_shared"] == 1
    assert plan["unique_bytes"] + plan["shared_bytes"] == plan["logical_bytes"]
    assert plan["rungs"][UP] == "own"


def test_plan_exact_and_tier_are_honoured(
    pair: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *pair, "--policy", "exact", "--json"]) == 0
    rungs = json.loads(capfd.readouterr().out)["rungs"]
    assert [name for name, rung in rungs.items() if rung == "own"] == [UP]
    assert main(["plan", *pair, "--tier", "Gemma-2-2B", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["tau_frob"] == 0.07


def test_plan_from_shapes_adds_up(pair: tuple[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    config = str(Path(pair[0]) / "config.json")
    assert main(["plan", "--config", config, "--variants", "3", "--json"]) == 0
    size = json.loads(capfd.readouterr().out)
    assert set(size) == {"single_mib", "naive_mib", "linked_mib", "saved_percent"}
    assert size["naive_mib"] == pytest.approx(3 * size["single_mib"])
    assert size["saved_percent"] == pytest.approx(
        100 * (1 - size["linked_mib"] / size["naive_mib"])
    )
    assert (
        main(["plan", "--config", config, "--variants", "3", "--dtype", "float32", "--json"]) == 0
    )
    assert json.loads(capfd.readouterr().out)["single_mib"] == pytest.approx(2 * size["single_mib"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "/nowhere", "/elsewhere"], "donor /nowhere: The checkpoint directory"),
        (["scan", "/nowhere", "/elsewhere", "--tier", "Qwen2.5-3B"], "without --sample"),
        (["plan"], "--config"),
        (["plan", "--config", "/nowhere", "--variants", "2"], "cannot be read"),
        (["plan", "--config", "/nowhere"], "--variants"),
        (["plan", "a", "b", "--variants", "2"], "--config"),
        (["plan", "--config", "c", "--variants", "2", "--budget-kl", "1"], "budget_kl"),
        (["pln"], "Did you mean plan?"),
    ],
)
def test_user_error_is_one_line_and_status_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_linker_help_lists_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capfd.readouterr().out
    assert all(command in out for command in ("serve", "scan", "plan", "tune", "bench", "demo"))


def test_scan_from_any_directory_finds_the_shipped_tiers(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "server.cli.main", "plan", *pair, "--tier", "Qwen2.5-3B"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tier Qwen2.5-3B" in done.stdout


def test_linker_says_its_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("linker 0.")


def test_scan_into_a_closed_pipe_is_silent(pair: tuple[str, str]) -> None:
    script = f"{sys.executable} -m server.cli.main scan {pair[0]} {pair[1]} --json | head -c 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{", "")
