"""`linker analyze probe`: the list, and one probe's table or document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.probes import PROBES
from server.cli.main import main
from tests.analysis.planted import Planted


@pytest.fixture(scope="session")
def models(small_family: Planted) -> list[str]:
    """BASE and VARIANTs."""
    return [str(small_family.base), *map(str, small_family.variants.values())]


def test_without_a_name_all_probes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "probe", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {entry["name"]: entry["answers"] for entry in document["probes"]} == PROBES
    assert main(["analyze", "probe"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PROBES)


def test_the_list_imports_no_probe() -> None:
    program = (
        "import sys; from server.cli.main import main; main(['analyze', 'probe'])\n"
        "assert not {'torch', 'scipy', 'plotly'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_declares_its_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["analyze", "probe", name, "--help"])
    assert ended.value.code == 0
    assert f"linker analyze probe {name}" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["before", "after"])
def test_json_may_stand_before_the_name_or_after_it(
    models: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["probe", "low-rank", *models, "--tolerance", "0.5"]
    words.insert(1 if place == "before" else len(words), "--json")
    assert main(["analyze", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["probe"], document["base"]) == ("low-rank", Path(models[0]).name)
    assert document["left_out"] == []
    assert document["facts"]["tolerance"] == 0.5
    assert [row["variant"] for row in document["rows"]] == [Path(path).name for path in models[1:]]


def test_a_table_has_facts_and_notes_below(
    models: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["analyze", "probe", "rmsnorm-rescaling", *models, "--blocks", "0"]) == 0
    out = capsys.readouterr().out
    assert "relative_change" in out
    assert out.index("moved") < out.index("least_symmetric_ratio") < out.index("BS table 3")


def test_a_users_fault_is_one_line(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "probe", "mlp-permutation", *models, "--blocks", "99"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("linker analyze: --blocks is '99'")
    assert error.count("\n") == 1
