"""`linker export`: a plan written as a folder, and what the command says of its size."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_data import check_data, check_donor
from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint
from server.cli import export
from server.cli.main import EXIT_USAGE, main
from server.cli.plan import plan_pair
from tests.lora import make_adapter
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("exported")
    donor = make_checkpoint(root / "d", tie=False)
    return str(donor), str(make_variant(root / "v", donor, scale=0.01))


def exported(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["export", *arguments, "--json"]) == 0
    record: dict[str, Any] = json.loads(capfd.readouterr().out)
    return record


def test_export_by_size_writes_what_it_says(
    pair: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    with Checkpoint.open(pair[1]) as variant:
        limit = variant.nbytes // 2
    said = exported(capfd, *pair, str(target), "--max-bytes", str(limit))
    with DeltaFile.open(target) as delta, Checkpoint.open(pair[0]) as donor:
        check_donor(delta, donor)
        check_data(delta)
        assert delta.plan.donor_fingerprint == fingerprint(donor)
        assert delta.nbytes == said["delta_bytes"] <= limit
        assert delta.plan.price is not None
        assert delta.plan.price.to_json() == said["price"]
        assert said["ratio"] == delta.nbytes / delta.plan.checkpoint_bytes
        assert sum(said["rung_bytes"].values()) == delta.nbytes
    assert said["file_bytes"] == (target / DELTA_FILE).stat().st_size > said["delta_bytes"]


def test_export_under_thresholds_needs_no_residual(
    pair: tuple[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    target = tmp_path / "out"
    loose = ("--tau-cos", "0.9", "--tau-frob", "0.5")
    assert main(["export", *pair, str(target), *loose]) == 0
    said = capfd.readouterr().out
    assert "bits per weight" in said
    with DeltaFile.open(target) as delta:
        assert delta.plan.tau_cos == 0.9
        assert not delta.plan.has_residuals
        assert delta.plan.blocks.alias == 2


def test_export_of_an_adapter_keeps_its_factors(
    pair: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "lora", Path(pair[0]), rank=3)
    said = exported(capfd, pair[0], str(adapter), str(tmp_path / "out"))
    assert said["policy"] == "adapter"
    assert said["price"] is None
    assert set(said["rung_bytes"]) == {"alias", "lowrank"}
    with Checkpoint.open(pair[0]) as donor, DeltaFile.open(tmp_path / "out") as delta:
        assert delta.plan.donor_fingerprint == fingerprint(donor)


@pytest.mark.parametrize("option", [["--budget-kl", "0.1"], ["--policy", "exact"]])
def test_export_of_an_adapter_refuses_what_says_how_to_share(
    pair: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], option: list[str]
) -> None:
    adapter = make_adapter(tmp_path / "lora", Path(pair[0]), rank=3)
    assert main(["export", pair[0], str(adapter), str(tmp_path / "out"), *option]) == EXIT_USAGE
    assert "has no meaning for an adapter" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_leaves_what_is_there_alone(
    pair: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("kept")
    assert main(["export", *pair, str(target), "--policy", "exact"]) == EXIT_USAGE
    assert "exists" in capfd.readouterr().err
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert (target / "mine").read_text() == "kept"


def test_export_without_a_place_for_it_is_refused(
    pair: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "absent" / "out"
    assert main(["export", *pair, str(target), "--policy", "exact"]) == EXIT_USAGE
    assert "cannot be written" in capfd.readouterr().err


@pytest.mark.parametrize("changed", ["donor", "variant"])
def test_checkpoint_that_changes_after_planning_leaves_nothing(
    pair: tuple[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    paths = {
        role: shutil.copytree(path, tmp_path / role)
        for role, path in zip(("donor", "variant"), pair, strict=True)
    }

    def plan_then_change(args: argparse.Namespace) -> Any:
        planned = plan_pair(args)
        file = paths[changed] / "model.safetensors"
        os.utime(file, ns=(1, 1))  # as another file of the same size and shapes
        return planned

    monkeypatch.setattr(export, "plan_pair", plan_then_change)
    target = tmp_path / "out"
    told = main(["export", *map(str, paths.values()), str(target), "--policy", "exact"])
    assert (told != 0, "changed" in capfd.readouterr().err) == (True, True)
    assert not target.exists()
