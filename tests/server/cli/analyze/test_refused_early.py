"""What is wrong on a command line is found before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from linker_core.weights.checkpoint import Checkpoint
from server.cli.main import EXIT_USAGE, main
from tests.analysis.planted import Planted

ROW = {"messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "it"}]}
TEXTS = "--texts=t={rows}"
TRAINING = "--train={rows} --held-out={rows}"
WRONG = [
    ("kernel", "--compose a=one b=nobody", "is no fine-tune of this family"),
    ("kernel", "--compose a=one", "at least two specialists"),
    ("kernel", "--compose a=one a=two", "names 'a' twice"),
    ("kernel", "--temperature 0", "--temperature"),
    ("kernel", "--seed -1", "--seed"),
    ("kernel", f"{TEXTS} --device nowhere", "--device"),
    ("kernel", "--tensors nothing", "No tensor is called"),
    ("eval", "--wikitext={text} --temperature 0", "--temperature"),
    ("eval", "--wikitext={text} --seed -1", "--seed"),
    ("eval", "--wikitext={text} --device nowhere", "--device"),
    ("eval", "--wikitext={text} --output-scales 1e9", "--output-scales holds"),
    ("eval", "--wikitext={text} --outputs --max-tokens 0", "--max-tokens"),
    ("eval", "--wikitext={text} --tensors nothing", "No tensor is called"),
    ("eval", "--wikitext={text} --stride 4096", "--stride"),
    ("transfer", "--source {family} --wikitext={text} --seed -1", "--seed"),
    ("transfer", "--source {family} --wikitext={text} --device nowhere", "--device"),
    ("transfer", "--source {family} --wikitext={text} --full-length 1", "--full-length"),
    ("transfer", "--source {base} --wikitext={text}", "name two or more fine-tunes"),
    ("transfer", "--source {family} --wikitext={text} --alpha nan", "--alpha holds nan"),
    ("warm-start", f"{TRAINING} --alpha inf", "--alpha holds inf"),
    ("warm-start", f"{TRAINING} --seed -1", "--seed"),
    ("warm-start", f"{TRAINING} --source {{base}}", "name two or more fine-tunes"),
    ("warm-start", "--train={rows} --held-out={nowhere}", "nowhere"),
    ("diagnose", "--text={text} --text-tokens 20 --tensors nothing", "No tensor is called"),
    ("diagnose", "--text={nowhere}", "nowhere"),
    ("pca", "--other {family} --tensors nothing", "No tensor is called"),
    ("report", "-o {nowhere}/report.html", "cannot be written"),
    ("report", "-o {base}", "cannot be written"),
    ("probe mlp-permutation", "--seed -1", "--seed"),
    ("probe refusal-direction", "--refused={rows} --answered={rows} --seed -1", "--seed"),
    ("probe refusal-direction", "--refused={rows} --answered={rows} --layer 9", "--layer"),
    ("probe interpolation", "--text={nowhere}", "nowhere"),
    ("probe amplification", "--text={text} --tokens 1", "sequences of 1 tokens"),
    ("probe gradient-locality", "--text={nowhere}", "nowhere"),
    ("probe version-over-version", "--other {base} {variant}", "Two pairs are called 'one'"),
    ("probe gain", "--gain one=1 --other {base} {variant}", "Two pairs are called 'one'"),
]


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that reads a weight."""

    def read(*_args: object, **_options: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(Checkpoint, "read_into", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("study", "options", "reason"), WRONG)
def test_a_wrong_option_is_refused_before_a_weight_is_read(
    study: str,
    options: str,
    reason: str,
    small_family: Planted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 4)
    (tmp_path / "text.txt").write_text("The sun rose over the hills. " * 40)
    models = [str(small_family.base), *map(str, small_family.variants.values())]
    places = {
        "rows": tmp_path / "rows.jsonl",
        "text": tmp_path / "text.txt",
        "nowhere": tmp_path / "nowhere",
        "base": small_family.base,
        "variant": small_family.variants["one"],
        "family": " ".join(models),
    }
    before = sorted(tmp_path.iterdir())
    words = ["analyze", *study.split(), *models, *options.format(**places).split()]
    assert main(words) == EXIT_USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("linker analyze: ")
    assert said.err.count("\n") == 1
    assert reason in said.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("study", "options"),
    [
        ("kernel", ""),
        ("eval", "--wikitext={text}"),
        ("transfer", "--source {family} --wikitext={text}"),
        ("warm-start", "--train={text} --held-out={text}"),
    ],
)
def test_one_fine_tune_is_refused_before_a_weight_is_read(
    study: str,
    options: str,
    small_family: Planted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sun rose over the hills. ")
    one = [str(small_family.base), str(small_family.variants["one"])]
    places = {"text": text, "family": " ".join(one)}
    assert main(["analyze", study, *one, *options.format(**places).split()]) == EXIT_USAGE
    assert "at least two fine-tunes" in capsys.readouterr().err


@pytest.mark.usefixtures("unread")
def test_a_fine_tune_of_a_short_context_is_refused_before_a_weight_is_read(
    small_family: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, short = tmp_path / "text.txt", tmp_path / "short"
    text.write_text("The sun rose over the hills. " * 40)
    shutil.copytree(small_family.variants["one"], short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    models = [str(small_family.base), str(small_family.variants["two"]), str(short)]
    assert main(["analyze", "eval", *models, f"--wikitext={text}"]) == EXIT_USAGE
    assert f"{short}: its context is 64 tokens" in capsys.readouterr().err
