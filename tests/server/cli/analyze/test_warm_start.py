"""`linker analyze warm-start` on a tiny family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.cli.main import main
from tests.analysis.planted import Planted


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Rows to train and to measure on, as options."""
    for name, first in (("train", 0), ("held", 100)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"What is {i}?"},
                    {"role": "assistant", "content": f"{i} is a number."},
                ]
            }
            for i in range(first, first + 6)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--train", str(tmp_path / "train.jsonl"), "--held-out", str(tmp_path / "held.jsonl")]


def arguments(planted: Planted, *options: str) -> list[str]:
    models = [str(planted.base), *map(str, planted.variants.values())]
    return ["analyze", "warm-start", *models, *options]


def test_json_holds_every_start_with_curves_of_each_seed(
    small_family: Planted, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--source", str(small_family.base), *map(str, small_family.variants.values())]
    options = ["--steps", "4", "--batch", "2", "--every", "2", "--seeds", "2", "--json"]
    assert main(arguments(small_family, *files, *source, *options)) == 0
    found = json.loads(capsys.readouterr().out)
    starts = found["starts"]
    assert list(starts) == [
        "base", "base + kernel", "base + noise", "base + source kernel (raw)",
        "base + source kernel (sign-norm)",
    ]  # fmt: skip
    for start in starts.values():
        assert [len(curve["trained"]) for curve in start["curves"]] == [4, 4]
        assert [[step for step, _ in c["measured"]] for c in start["curves"]] == [[0, 2, 4]] * 2
    assert starts["base"]["area_gain"]["mean"] == 0
    assert starts["base"]["steps_to_base"] == [4, 4]
    # The family is its own source here.
    assert starts["base + source kernel (raw)"]["curves"] == starts["base + kernel"]["curves"]
    assert starts["base + noise"]["first"]["mean"] != starts["base"]["first"]["mean"]
    assert found["kernel_of"] == list(small_family.names)


def test_table_names_the_starts_and_says_what_not_to_name(
    small_family: Planted, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "2", "--batch", "2", "--every", "1", "--seeds", "2"]
    assert main(arguments(small_family, *files, *options)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "base + noise" in shown
    assert "Name no variant that was trained on the same text" in shown


@pytest.mark.parametrize(
    "wrong",
    [
        ("--seeds", "0"),
        ("--every", "61"),
        ("--steps", "0"),
        ("--alpha", "inf"),
        ("--seed", "-1"),
        ("--dtype", "bfloat16"),
        ("--held-out-tokens", "0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    small_family: Planted,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
    wrong: tuple[str, str],
) -> None:
    assert main(arguments(small_family, *files, *wrong)) == 2
    assert "linker analyze: " in capsys.readouterr().err
