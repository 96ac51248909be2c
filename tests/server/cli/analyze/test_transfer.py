"""`linker analyze transfer` between tiny families of two architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.cli.main import main
from tests.analysis.planted import Planted, Structure, plant_family

RECORDS = [
    {"instruction": f"Add {i} and {i}", "input": "", "output": f"It is {2 * i}"} for i in range(4)
]


@pytest.fixture(scope="module")
def other_family(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A Llama of the same projection shapes, whose deltas are twice as large."""
    return plant_family(
        tmp_path_factory.mktemp("llama"),
        Structure(num_variants=3, scale=0.1),
        architecture="llama",
        seed=5,
    )


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A text and some instructions, as options."""
    (tmp_path / "text.txt").write_text("Plain words, one after another. " * 20)
    (tmp_path / "alpaca.json").write_text(json.dumps(RECORDS))
    return [
        "--wikitext", str(tmp_path / "text.txt"), "--tokens", "200",
        "--instruct", str(tmp_path / "alpaca.json"),
    ]  # fmt: skip


def paths(planted: Planted) -> list[str]:
    return [str(planted.base), *map(str, planted.variants.values())]


def arguments(target: Planted, source: Planted, *options: str) -> list[str]:
    return ["analyze", "transfer", *paths(target), "--source", *paths(source), *options]


def document(capsys: pytest.CaptureFixture[str], command: list[str]) -> dict[str, Any]:
    assert main([*command, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_holds_all_conditions_with_norms_and_changes(
    small_family: Planted,
    other_family: Planted,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = document(capsys, arguments(small_family, other_family, *files))
    conditions = {entry["key"]: entry for entry in found["conditions"]}
    assert list(conditions) == [*(f"C{i}" for i in range(8)), "A3", "A4", "S2", "N1", "N2", "N5"]
    norms = {key: entry["norm"] for key, entry in conditions.items()}
    assert norms["C0"] == norms["C6"] == 0
    assert norms["C3"] ** 2 + norms["C4"] ** 2 == pytest.approx(norms["C2"] ** 2)
    assert (norms["N1"], norms["N2"]) == pytest.approx((norms["C1"], norms["C2"]))
    assert norms["C7"] == pytest.approx(norms["C1"])
    # Aligned kernels have the norm of the target's mean delta, here sqrt(0.6) of a delta's.
    whole = sum(float(gram[0, 0]) for gram in small_family.grams_NN.values()) ** 0.5
    assert norms["C5"] == pytest.approx(0.6**0.5 * whole, rel=1e-3)
    assert conditions["C0"]["changes"]["wikitext_full_sequence"]["percent"] == 0
    assert conditions["C2"]["changes"]["wikitext_full_sequence"]["percent"] != 0
    assert conditions["C7"]["baseline"] == "C6"
    assert conditions["C5"]["title"] == "source → target (sign-norm)"
    assert found["num_tensors"] == 14
    assert found["agreement"]["all"]["cos_rms"] < 0.1


def test_tables_show_each_metric_of_all_conditions(
    small_family: Planted,
    other_family: Planted,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(small_family, other_family, *files, "--fm-only", "--names", "Qwen", "Llama")
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Llama → Qwen (sign-norm)" in shown
    assert "Qwen → Llama" in shown
    assert "WikiText PPL, full" in shown
    assert "instruct PPL, response" in shown
    assert "N2" not in shown.split("C0-C7 are FM's")[0]


def test_families_without_equal_shapes_are_refused(
    small_family: Planted,
    tmp_path: Path,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = plant_family(tmp_path, Structure(num_variants=2), hidden=64, intermediate=96)
    assert main(arguments(small_family, wide, *files)) == 2
    assert "equal projection shapes" in capsys.readouterr().err


def test_scale_that_is_no_number_is_refused(
    small_family: Planted,
    other_family: Planted,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(small_family, other_family, *files, "--alpha", "nan")) == 2
    assert "nan" in capsys.readouterr().err


def test_families_without_a_common_tensor_are_refused_before_what_is_to_be_measured(
    small_family: Planted, other_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["transfer", *paths(small_family), "--source", *paths(other_family)]
    assert main(["analyze", *given, "--tensors", "*.0.mlp.up*"]) == 2
    assert "Nothing to measure" in capsys.readouterr().err
    assert main(["analyze", *given, "--tensors", "*.q_proj.bias"]) == 2
    assert "in the same shape" in capsys.readouterr().err
