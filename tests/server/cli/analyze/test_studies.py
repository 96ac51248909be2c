"""`linker analyze pca`, `stability` and `diagnose`: what they print and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.cli.main import main
from tests.analysis.planted import Planted, Structure, plant_family


def words(planted: Planted, *, number: int | None = None) -> list[str]:
    """BASE and VARIANTs, the first few of them."""
    return [str(planted.base), *map(str, list(planted.variants.values())[:number])]


def document(capsys: pytest.CaptureFixture[str], *given: str) -> Any:
    assert main(["analyze", *given, "--draws", "59", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_pca_prints_each_tensor_with_its_null(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "pca", *words(small_family))

    assert len(found["tensors"]) == 14
    for tensor in found["tensors"]:
        assert tensor["pc1"] == pytest.approx(0.6, abs=1e-3)
        assert tensor["null95"] < 0.6
        assert {"name", "pc1_centred", "cos_mean"} <= set(tensor)
        assert len(tensor["norms"]) == len(tensor["loadings"]) == 5
    assert found["summary"]["components"]["all"]["pc1"] == pytest.approx(0.6, abs=1e-3)
    assert found["cross_family"] is None


def test_pca_of_some_tensors_studies_these_alone(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "pca", *words(small_family), "--tensors", "*.0.mlp.*")

    assert {tensor["component"] for tensor in found["tensors"]} == {"gate", "up", "down"}
    assert set(found["summary"]["components"]) == {"gate", "up", "down", "mlp", "all"}


def test_pca_is_repeatable_and_follows_its_seed(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("pca", *words(small_family), "--tensors", "*.0.mlp.up*")
    first, again = document(capsys, *given), document(capsys, *given)

    assert first == again
    other = document(capsys, *given, "--seed", "1")
    assert other["tensors"][0]["null95"] != first["tensors"][0]["null95"]


def test_pca_with_another_family_correlates_their_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = plant_family(
        tmp_path, Structure(num_variants=3, scales={"two": 0.2}, orthogonal=False), layers=4
    )

    found = document(capsys, "pca", *words(planted), "--other", *words(planted))

    across = found["cross_family"]["pc1_centred"]
    assert {name for name, row in across.items() if row is not None} >= {"attention", "mlp", "gap"}
    assert across["attention"]["r"] == pytest.approx(1.0)
    assert across["attention"]["num_points"] == 4
    assert found["cross_family"]["families"] == [f"{tmp_path.name}/base"] * 2
    assert (
        main(["analyze", "pca", *words(planted), "--draws", "19", "--other", *words(planted)]) == 0
    )
    assert "Pearson's r" in capsys.readouterr().out


def test_pca_with_another_family_of_few_layers_correlates_nothing(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    other = words(small_family, number=3)
    other[0] = f"second={other[0]}"
    given = ["pca", *words(small_family), "--draws", "19", "--other", *other]

    assert main(["analyze", *given, "--json"]) == 0
    across = json.loads(capsys.readouterr().out)["cross_family"]
    assert across["families"] == ["base", "second"]
    assert set(across["pc1_centred"].values()) == {None}  # two layers each
    assert main(["analyze", *given]) == 0
    assert "base and second" in " ".join(capsys.readouterr().out.split())


def test_pca_prints_tables_that_people_read(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "pca", *words(small_family), "--draws", "19", "--list"]) == 0

    out = capsys.readouterr().out
    assert "FM table 2" in out
    assert "FM table 6" in out
    assert "gap" in out
    assert "1.down" in out
    assert "null95" in out


def test_pca_of_two_prints_the_shared_fraction_and_no_pc1(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "pca", *words(small_family, number=2))

    assert found["summary"]["shared_fraction"]["mean"] == pytest.approx(0.25, abs=1e-3)
    assert all(tensor["pc1"] is tensor["pc1_centred"] is None for tensor in found["tensors"])
    assert main(["analyze", "pca", *words(small_family, number=2), "--draws", "19"]) == 0
    out = capsys.readouterr().out
    assert "FM appendix B" in out
    assert "PC1" not in out


@pytest.mark.parametrize(
    ("study", "number", "message"),
    [
        ("pca", 1, "PC1 needs three"),
        ("stability", 2, "leaving one of three out"),
    ],
)
def test_too_few_fine_tunes_are_refused_with_the_reason(
    study: str,
    number: int,
    message: str,
    small_family: Planted,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["analyze", study, *words(small_family, number=number)]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("study", "option", "value", "expected"),
    [
        ("pca", "--draws", "18", "19 to 100000"),
        ("stability", "--seed", "-1", "0 or more"),
        ("diagnose", "--text-tokens", "1", "2 to 8192"),
    ],
)
def test_an_option_out_of_range_is_refused_with_the_range(
    study: str,
    option: str,
    value: str,
    expected: str,
    small_family: Planted,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["analyze", study, *words(small_family), option, value]) != 0
    assert expected in capsys.readouterr().err


def test_stability_prints_fm_table_7(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = plant_family(tmp_path, Structure(shared=0.1, scales={"one": 0.6, "two": 0.1}))

    found = document(capsys, "stability", *words(planted))

    centred = found["jackknife"]["centred"]
    assert centred["one"]["role"] == "periphery"
    assert centred["three"]["role"] == "core"
    assert centred["one"]["cosine_min"] <= centred["one"]["cosine"] < 0.5
    assert centred["one"]["tensor_of_min"] in {tensor["name"] for tensor in found["tensors"]}
    assert main(["analyze", "stability", *words(planted), "--draws", "19"]) == 0
    assert "FM table 7" in capsys.readouterr().out


def test_stability_of_three_is_uncentred_alone(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "stability", *words(small_family, number=3))

    assert list(found["jackknife"]) == ["uncentred"]
    assert any("needs four" in note for note in found["notes"])


def test_diagnose_says_what_stands_out_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = plant_family(tmp_path, Structure(shared=0.1, scales={"four": 0.6, "five": 0.0}))

    found = document(capsys, "diagnose", *words(planted))

    kinds = {(entry["model"], entry["kind"]) for entry in found["diagnostics"]}
    assert ("four", "continued_pretraining") in kinds
    assert ("five", "degenerate") in kinds
    assert found["variants"]["four"]["region"] == "outside"
    assert found["variants"]["one"]["kl"] is None
    assert main(["analyze", "diagnose", *words(planted), "--draws", "19"]) == 0
    assert "continued_pretraining" in capsys.readouterr().out


def test_diagnose_of_one_fine_tune_is_possible(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "diagnose", *words(small_family, number=1))

    assert found["diagnostics"] == []
    assert list(found["variants"]) == ["one"]
    assert main(["analyze", "diagnose", *words(small_family, number=1), "--draws", "19"]) == 0
    assert "None of degenerate" in capsys.readouterr().out


def test_diagnose_without_a_text_loads_no_model(small_family: Planted) -> None:
    program = (
        "import sys; from server.cli.main import main\n"
        "assert main(['analyze', 'diagnose', '--draws', '19', *sys.argv[1:]]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program, *words(small_family)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.shared
def test_diagnose_with_a_text_measures_the_kl_to_the_base(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The king rode north with his men and came to the river at night. " * 4)
    family = shared / "families" / "mini-qwen2"
    given = (str(family / "base"), f"copy={family / 'base'}", str(family / "math"))

    found = document(capsys, "diagnose", *given, "--text", str(text), "--tensors", "*.0.mlp.up*")

    assert found["variants"]["copy"]["kl"] == 0.0
    assert found["variants"]["math"]["kl"] > 0.1
    kinds = {(entry["model"], entry["kind"]) for entry in found["diagnostics"]}
    assert ("copy", "degenerate") in kinds
    assert ("math", "degenerate") not in kinds


@pytest.mark.parametrize("study", ["pca", "stability", "kernel"])
def test_a_base_as_its_own_fine_tune_is_named(
    study: str, small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words(small_family, number=3), f"copy={small_family.base}", "--tensors", "*.0.mlp.*"]
    assert main(["analyze", study, *given, "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [note.split()[0] for note in notes if "very weights" in note] == ["copy"]


def test_pca_of_two_prints_the_interval_of_the_shared_fraction(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(small_family, number=2)
    intervals = [one["shared_interval"] for one in document(capsys, "pca", *given)["tensors"]]
    low, high = (sum(ends) / len(intervals) for ends in zip(*intervals, strict=True))
    assert main(["analyze", "pca", *given, "--draws", "59"]) == 0
    said = capsys.readouterr().out.split()
    assert said[said.index("all") + 2] == f"{low:.3f}-{high:.3f}"


@pytest.mark.parametrize(("glob", "others"), [("*.0.*", True), ("*.0.mlp.*", False)])
def test_pca_says_how_many_tensors_are_of_no_component(
    glob: str, others: bool, small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words(small_family), "--tensors", glob, "--draws", "19"]
    assert main(["analyze", "pca", *given]) == 0
    assert ("Tensors of no component" in capsys.readouterr().out) == others
