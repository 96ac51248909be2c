from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from analysis.evaluation.suite import Suite, SuiteFiles
from analysis.family import StudiedFamily
from analysis.probes import gain
from analysis.probes.gain import Gain
from linker_core.errors import InvalidRequestError
from tests.analysis.probes.columns import fact, numbers, records
from tests.tiny import make_checkpoint, make_variant, save_state

EPSILONS = {"a": 0.01, "b": 0.02, "c": 0.04, "d": 0.05}


@pytest.fixture
def four(tmp_path: Path) -> dict[str, Path]:
    base = make_checkpoint(tmp_path / "base", dtype="float32")
    variants = {
        name: make_variant(tmp_path / name, base, scale=scale) for name, scale in EPSILONS.items()
    }
    return {"base": base, **variants}


def _open(four: dict[str, Path]) -> StudiedFamily:
    base, *_ = four.values()
    return StudiedFamily.open(base, {name: four[name] for name in EPSILONS})


def test_gains_along_epsilon_correlate_fully(four: dict[str, Path]) -> None:
    with _open(four) as family:
        gains = {name: Gain(100 * scale, None) for name, scale in EPSILONS.items()}
        result = gain.correlate(family, gains)
    assert numbers(result, "epsilon") == pytest.approx(list(EPSILONS.values()), rel=1e-4)
    assert fact(result, "pearson_r") == pytest.approx(1.0, abs=1e-4)


def test_the_correlation_is_that_by_hand_with_its_interval(four: dict[str, Path]) -> None:
    # ε less their mean, in hundredths: -2, -1, 1, 2; gains 1, -1, 1, -1. r = -2 / (√10 √4).
    gains = dict(zip(EPSILONS, (Gain(p, 0.5) for p in (1.0, -1.0, 1.0, -1.0)), strict=True))
    with _open(four) as family:
        result = gain.correlate(family, gains)
    assert fact(result, "pearson_r") == pytest.approx(-2 / 40**0.5, abs=1e-3)
    assert fact(result, "pearson_low") < fact(result, "pearson_r") < fact(result, "pearson_high")
    assert numbers(result, "stderr") == [0.5] * 4


def test_another_familys_pair_counts_too(four: dict[str, Path], tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "llama", architecture="llama", dtype="float32")
    chat = make_variant(tmp_path / "llama-chat", base, scale=0.2)
    with StudiedFamily.open(four["base"], {"a": four["a"], "b": four["b"]}) as family:
        gains = {"a": Gain(1, None), "b": Gain(2, None), "llama-chat": Gain(20, None)}
        result = gain.correlate(family, gains, [(base, chat)])
        with pytest.raises(InvalidRequestError, match="at least 3 pairs"):
            gain.correlate(family, gains)
    assert [row["variant"] for row in records(result)] == ["a", "b", "llama-chat"]
    assert fact(result, "pearson_r") == pytest.approx(1.0, abs=1e-3)
    assert result.facts["pearson_low"] is None  # three pairs have no interval


def test_equal_gains_have_no_correlation(four: dict[str, Path]) -> None:
    with _open(four) as family:
        result = gain.correlate(family, dict.fromkeys(EPSILONS, Gain(1.0, None)))
    assert result.facts["pearson_r"] is None


def test_stated_gains_are_read() -> None:
    assert gain.stated_gains(["chat=1.5", "x=y=-2"], ["chat", "x=y"]) == {
        "chat": Gain(1.5, None),
        "x=y": Gain(-2.0, None),
    }


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (["chat"], "VARIANT=POINTS"),
        (["chat=much"], "VARIANT=POINTS"),
        (["chat=nan"], "VARIANT=POINTS"),
        (["chta=1"], "Did you mean chat"),
        (["chat=1"], "says nothing of math"),
    ],
)
def test_stated_gains_that_say_nothing_are_refused(stated: list[str], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        gain.stated_gains(stated, ["chat", "math"])


def test_without_questions_and_gains_there_is_nothing_to_correlate(family: StudiedFamily) -> None:
    parser = ArgumentParser()
    gain.add_arguments(parser)
    with pytest.raises(InvalidRequestError, match="--mmlu or --tasks"):
        gain.run(family, parser.parse_args([]))


def test_too_few_pairs_are_refused_before_any_is_measured(
    four: dict[str, Path], tmp_path: Path
) -> None:
    parser = ArgumentParser()
    gain.add_arguments(parser)
    args = parser.parse_args(["--tasks", str(tmp_path / "not looked for")])
    with (
        StudiedFamily.open(four["base"], {"a": four["a"], "b": four["b"]}) as family,
        pytest.raises(InvalidRequestError, match="at least 3 pairs"),
    ):
        gain.run(family, args)


def test_measured_gains_are_points_from_the_base(four: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"query": f"Question {number}:", "choices": [" one", " two", " six"], "label": number % 3}
        for number in range(12)
    ]
    text = "\n".join(map(json.dumps, rows))
    (folder / "piqa_val.jsonl").write_text(text)
    suite = Suite.load(SuiteFiles(tasks=folder))
    variants = {"copy": four["base"], "d": four["d"]}
    with StudiedFamily.open(four["base"], variants) as family:
        gains = gain.measured_gains(family, suite, [(four["d"], four["base"])])
    assert gains["copy"] == Gain(0.0, 0.0)
    # The pair turned round: what one gains, the other loses.
    assert gains["base"].points == -gains["d"].points


def test_a_model_that_diverges_is_named(four: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    row = {"query": "Question", "choices": [" one", " two"], "label": 0}
    (tmp_path / "tasks" / "piqa_val.jsonl").write_text(json.dumps(row))
    suite = Suite.load(SuiteFiles(tasks=tmp_path / "tasks"))
    broken = make_variant(tmp_path / "broken", four["base"], scale={})
    state = load_file(broken / "model.safetensors")
    # Finite, or the file is refused; what it is multiplied with is no longer.
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], 3e38)
    save_state(broken, state)
    with (
        StudiedFamily.open(four["base"], {"broken": broken}) as family,
        pytest.raises(InvalidRequestError, match=r"broken: the model's outputs are no numbers"),
    ):
        gain.measured_gains(family, suite)
