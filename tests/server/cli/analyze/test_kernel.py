"""`linker analyze kernel`: what it prints, what it refuses, and what it exports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.model import StudyModel
from linker_core.weights.checkpoint import Checkpoint
from server.bridge.process import ENGINE_COMMAND
from server.cli.main import main
from tests.analysis.planted import Planted
from tests.server.live import live_server

PROMPT = "Once upon a time"


def _paths(planted: Planted) -> list[str]:
    return [str(planted.base), *map(str, planted.variants.values())]


def _document(
    planted: Planted, capsys: pytest.CaptureFixture[str], *options: str
) -> dict[str, Any]:
    assert main(["analyze", "kernel", *_paths(planted), *options, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_holds_kernel_comparisons_and_strategies(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _document(small_family, capsys)
    kernel = found["kernel"]
    assert kernel["fine_tunes"] == list(small_family.names)
    assert kernel["tensors"].keys() == small_family.grams_NN.keys()
    assert found["uniform"]["norm"] == pytest.approx(kernel["norm"])
    # Half of every delta is along one direction: the mean of five is sqrt(0.6) of one of them.
    whole = sum(float(gram[0, 0]) for gram in small_family.grams_NN.values()) ** 0.5
    assert found["raw_mean"]["norm"] == pytest.approx(0.6**0.5 * whole, rel=1e-3)
    assert found["strategies"]["mean"]["coefficients"] == pytest.approx([0.2] * 5)
    assert found["export"] is None


def test_options_reach_the_kernel(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    cold = _document(
        small_family, capsys, "--temperature", "0.01", "--seed", "3", "--uncentred",
        "--strategy", "trimmed_mean", "--whole-model", "--tensors", "*.mlp.*",
    )["kernel"]  # fmt: skip
    assert (cold["temperature"], cold["seed"], cold["strategy"]) == (0.01, 3, "trimmed_mean")
    assert all(".mlp." in name for name in cold["tensors"])
    assert len({tuple(tensor["coefficients"]) for tensor in cold["tensors"].values()}) == 1
    assert not any(tensor["pc1_is_centred"] for tensor in cold["tensors"].values())
    assert cold["mean_weight"] > 0.9


def test_tables_compare_with_uniform_weights(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "kernel", *_paths(small_family)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "uniform weights of equal |K|" in shown
    assert "Weights by layer" in shown
    assert "geometric_median" in shown


@pytest.mark.parametrize(
    "options",
    [("--temperature", "0"), ("--temperature", "nan"), ("--seed", "-1"), ("--alpha", "inf")],
)
def test_numbers_out_of_range_are_refused(
    small_family: Planted,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: Sequence[str],
) -> None:
    more = (*options, "--export", str(tmp_path / "out"))
    assert main(["analyze", "kernel", *_paths(small_family), *more]) == 2
    assert "linker analyze: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["", "none/out"])
def test_an_export_that_cannot_be_made_is_refused_before_anything_is_read(
    small_family: Planted,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    target: str,
) -> None:
    def read(*_args: object, **_options: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("server.cli.analyze.kernel.gram_pass", read)

    status = main(["analyze", "kernel", *_paths(small_family), "--export", str(tmp_path / target)])

    assert status == 2
    assert "Name a folder" in capsys.readouterr().err


def test_tables_are_printed_before_an_export_that_fails(
    small_family: Planted, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--export", str(tmp_path / "out"), "--alpha", "1e300"]
    assert main(["analyze", "kernel", *_paths(small_family), *options]) == 2
    said = capsys.readouterr()
    assert "Weights by layer" in said.out
    assert "Metropolis-Hastings" in said.out
    assert "Wrote" not in said.out
    assert "leaves the range" in said.err
    assert not list(tmp_path.iterdir())


def test_json_is_printed_where_an_export_fails(
    small_family: Planted, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--export", str(tmp_path / "out"), "--alpha", "1e300", "--json"]
    assert main(["analyze", "kernel", *_paths(small_family), *options]) == 2
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["kernel"]["fine_tunes"] == list(small_family.names)
    assert found["export"] is None
    assert "leaves the range" in said.err


def test_an_export_is_told_of_after_the_tables(
    small_family: Planted, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    assert main(["analyze", "kernel", *_paths(small_family), "--export", str(target)]) == 0
    before, _, after = " ".join(capsys.readouterr().out.split()).partition("Wrote")
    assert "Weights by layer" in before
    assert "base + 1 · K" in after
    assert (target / "kernel.json").exists()


def test_a_kernel_without_texts_imports_no_torch(small_family: Planted, tmp_path: Path) -> None:
    options = ["--compose", "a=one", "b=two", "--export", str(tmp_path / "out")]
    arguments = ["analyze", "kernel", *_paths(small_family), *options]
    program = (
        "import sys; from server.cli.main import main\n"
        f"assert main({arguments!r}) == 0\n"
        "assert 'torch' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_one_fine_tune_is_refused(
    small_family: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "kernel", *_paths(small_family)[:2]]) == 2
    assert "at least two fine-tunes" in capsys.readouterr().err


def test_an_exported_kernel_is_served(
    small_family: Planted, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "kernel"
    shown = _document(small_family, capsys, "--export", str(target), "--alpha", "2")
    assert shown["export"] == {"path": str(target), "alpha": 2.0}
    base = shutil.copytree(small_family.base, tmp_path / "base")
    with live_server(
        tmp_path / "state",
        root=tmp_path,
        engine_command=ENGINE_COMMAND,
        settings={"engine": {"kv_cache_tokens": 2048}},
    ) as server:
        assert server.onboard("base", base).status_code == 201
        response = server.onboard("kernel", target, donor="base", policy="exact")
        assert response.status_code == 201, response.text
        answers = {
            model: server.complete(model, PROMPT, max_tokens=1, echo=True, logprobs=0)
            for model in ("base", "kernel")
        }
    base_n, found_n = (
        np.array(answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:-1])
        for answer in answers.values()
    )
    with Checkpoint.open(target) as written:
        model = StudyModel.open(written)
        ids = model.tokenizer.encode(PROMPT, add_special_tokens=True)
        expected_n = -model.losses(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(found_n, expected_n, rtol=1e-3)
    assert np.abs(base_n - found_n).max() > 0.01


def test_an_export_into_a_model_that_is_read_is_refused(
    small_family: Planted, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(small_family.base)
    for folder in (small_family.base, small_family.variants[small_family.names[1]], link):
        status = main(["analyze", "kernel", *_paths(small_family), "--export", str(folder / "k")])
        assert status == 2
        assert "a model that is read" in capsys.readouterr().err
        assert not (folder / "k").exists()
