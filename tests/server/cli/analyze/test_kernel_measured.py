"""`linker analyze kernel` on texts: specialists and their sum, weights by capability."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from server.cli.main import main
from tests.analysis.planted import Planted


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two files, as options."""
    for name, words in (("left", "cold rain falls on roofs"), ("right", "for x in range: y += x")):
        rows = [{"text": f"{words} {number} {words}"} for number in range(6)]
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    return ["--texts", f"a={tmp_path / 'left'}", f"b={tmp_path / 'right'}", "--tokens", "150"]


def _arguments(planted: Planted, *options: str) -> list[str]:
    paths = [str(planted.base), *map(str, planted.variants.values())]
    return ["analyze", "kernel", *paths, *options]


def _document(
    planted: Planted, capsys: pytest.CaptureFixture[str], *options: str
) -> dict[str, Any]:
    assert main(_arguments(planted, *options, "--json")) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_specialists_are_measured_with_and_without_each_other(
    small_family: Planted, capsys: pytest.CaptureFixture[str], texts: list[str]
) -> None:
    found = _document(small_family, capsys, "--compose", "a=one,two", "b=three", *texts)
    composed = found["composition"]
    assert composed["specialists"] == {"a": ["one", "two"], "b": ["three"]}
    assert composed["cosines"][0]["of"] == ["a", "b"]
    # A mean of two and a third that share half: <a, b> = 1/2, |a|² = 3/4.
    assert composed["cosines"][0]["cos"] == pytest.approx(0.5 / 0.75**0.5, abs=1e-3)
    assert composed["cosines"][0]["by_component"].keys() == {
        "q", "k", "v", "o", "gate", "up", "down",
    }  # fmt: skip
    losses = composed["losses"]
    assert losses.keys() == {"base", "a", "b", "their sum"}
    for label in "ab":
        with_others, alone = losses["their sum"][label], losses[label][label]
        change = with_others["perplexity"] / alone["perplexity"] - 1
        assert composed["interference"][label]["percent"] == pytest.approx(100 * change)


def test_a_kernel_is_measured_beside_its_companions(
    small_family: Planted, capsys: pytest.CaptureFixture[str], texts: list[str]
) -> None:
    losses = _document(small_family, capsys, *texts)["losses"]
    assert losses.keys() == {"base", "kernel", "uniform, its |K|", "raw mean"}
    for label in "ab":
        base, kernel = losses["base"][label], losses["kernel"][label]
        assert base["change"]["percent"] == 0
        change = kernel["perplexity"] / base["perplexity"] - 1
        assert kernel["change"]["percent"] == pytest.approx(100 * change)
        assert kernel["change"]["low"] <= kernel["change"]["percent"] <= kernel["change"]["high"]


def test_specialists_need_no_texts(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    composed = _document(small_family, capsys, "--compose", "a=one", "b=three")["composition"]
    assert composed["losses"] == {}
    assert composed["interference"] == {}


def test_capability_weighs_groups_by_the_texts(
    small_family: Planted, capsys: pytest.CaptureFixture[str], texts: list[str]
) -> None:
    options = ("--capability", "10", "--capability-temperature", "0.1", "--seed", "2", *texts)
    found = _document(small_family, capsys, *options)["capability"]
    assert found["weights"].keys() == {"0.attention", "0.mlp", "1.attention", "1.mlp"}
    assert all(0 <= weight <= 1 for weight in found["weights"].values())
    assert len(found["scores"]) == 12
    assert found["best_score"] == pytest.approx(max(found["scores"]))
    kernel = found["kernel"]
    assert (kernel["num_steps"], kernel["burn_in"], kernel["temperature"]) == (10, 2, 0.1)
    weight = kernel["tensors"]["model.layers.1.mlp.up_proj.weight"]["weight"]
    assert weight == pytest.approx(found["weights"]["1.mlp"])
    assert found["losses"].keys() == {
        "base", "by coherence", "raw mean", "by capability", "uniform, its |K|", "best seen",
    }  # fmt: skip
    assert found == _document(small_family, capsys, *options)["capability"]


def test_tables_show_both(
    small_family: Planted, capsys: pytest.CaptureFixture[str], texts: list[str]
) -> None:
    more = ("--compose", "a=one", "b=two", "--capability", "2", *texts)
    assert main(_arguments(small_family, *more)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Cosine between specialists' kernels" in shown
    assert "Specialists and their sum on the texts" in shown
    assert "Weights by capability" in shown
    assert "Kernels on the rows that scored no weight" in shown


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--capability", "5"], "give --texts"),
        (["--capability", "0"], "--capability is 0"),
        (["--capability-temperature", "-1"], "--capability-temperature is -1"),
        (["--texts", "nofile"], "LABEL=VALUE"),
        (["--texts", "a=one", "a=two"], "names 'a' twice"),
        (["--tokens", "1"], "--tokens is 1"),
        (["--compose", "a=one"], "at least two specialists"),
        (["--compose", "a=one", "b=nobody"], "'nobody' is no fine-tune"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    small_family: Planted,
    capsys: pytest.CaptureFixture[str],
    options: Sequence[str],
    reason: str,
) -> None:
    assert main(_arguments(small_family, *options)) == 2
    assert reason in capsys.readouterr().err


def test_a_text_of_one_row_is_refused(
    small_family: Planted, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text('{"text": "alone here"}')
    assert main(_arguments(small_family, "--texts", f"a={tmp_path / 'text'}")) == 2
    assert "a single row" in capsys.readouterr().err
