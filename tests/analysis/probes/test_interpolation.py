from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analysis.family import StudiedFamily
from analysis.model import StudyModel
from analysis.probes import interpolation
from analysis.probes.interpolation import Line
from analysis.probes.sequences import Excerpt
from linker_core.errors import InvalidRequestError
from tests.analysis.probes.columns import fact, records
from tests.tiny import make_checkpoint, make_variant, save_state

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _mean_loss(model: StudyModel, ids_ST: torch.Tensor) -> float:
    return float(model.losses(ids_ST).double().mean())


def test_lines_begin_at_the_variant_and_end_at_the_base(family: StudiedFamily, text: Path) -> None:
    with StudiedFamily.open(family.base.path, {"far": family.variants["far"].path}) as one:
        result = interpolation.measure(
            one, Excerpt(path=text, num_sequences=3, num_tokens=24), num_steps=2, blocks="1"
        )
        variant, base = StudyModel.open(one.variants["far"]), StudyModel.open(one.base)
        ids_ST = Excerpt(path=text, num_sequences=3, num_tokens=24).read(variant.checkpoint)
        begin, end = _mean_loss(variant, ids_ST), _mean_loss(base, ids_ST)
        block = [name for name in variant.names if name.startswith("model.layers.1.")]
        halfway = {name: (variant.get(name) + base.get(name)) / 2 for name in block}
        for name, values in halfway.items():
            variant.put(name, values)
        middle = _mean_loss(variant, ids_ST)
    assert [row["line"] for row in records(result)] == ["block 1", "all blocks", "whole model"]
    assert fact(result, "far: loss") == pytest.approx(begin, rel=1e-5)
    assert result.series["alpha"] == [0.0, 0.5, 1.0]
    assert result.series["far: whole model"][-1] == pytest.approx(end - begin, abs=1e-4)
    assert result.series["far: block 1"][1] == pytest.approx(middle - begin, abs=1e-4)


def test_the_model_is_left_as_it_was_between_lines(family: StudiedFamily, text: Path) -> None:
    def measure(blocks: str) -> Sequence[float]:
        found = interpolation.measure(
            family, Excerpt(path=text, num_sequences=2, num_tokens=16), num_steps=1, blocks=blocks
        )
        return found.series["far: block 2"]

    assert measure("all") == measure("2")


def test_a_copy_of_the_base_has_flat_lines(tmp_path: Path, text: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32")
    with StudiedFamily.open(base, {"copy": base}) as family:
        result = interpolation.measure(family, Excerpt(path=text, num_sequences=1, num_tokens=16))
    for row in records(result):
        # (1 - alpha) w + alpha w is not w to the last bit.
        assert row["rise"] == pytest.approx(0, abs=1e-5)
        assert row["end"] == pytest.approx(0, abs=1e-6)
        assert row["stderr"] is None  # of one sequence


def test_a_sum_up_of_a_known_line() -> None:
    # Two sequences; mean change 0, 3, 2 over alpha 0, 0.5, 1: a rise of 3, 2 above the chord.
    losses = np.array([[1.0, 5.0], [3.0, 9.0], [4.0, 6.0]])
    alphas = np.array([0.0, 0.5, 1.0])
    rise, at, stderr, barrier, lowest, end = interpolation._summary(Line("x", losses), alphas)
    assert (rise, at, barrier, lowest, end) == (3.0, 0.5, 2.0, 0.0, 2.0)
    assert stderr == pytest.approx(1.0)  # changes 2 and 4: deviation √2, over √2


def test_a_vocabulary_that_grew_is_no_part_of_the_line(tmp_path: Path, text: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32")
    grown = make_variant(tmp_path / "grown", base, scale=0.0, added_tokens=["<new>"])
    state = load_file(grown / "model.safetensors")
    state["model.norm.weight"] *= 2.0
    save_state(grown, state)
    with StudiedFamily.open(base, {"grown": grown}) as family:
        result = interpolation.measure(
            family, Excerpt(path=text, num_sequences=2, num_tokens=16), num_steps=1, blocks="0"
        )
    block, blocks, whole = records(result)
    assert block["end"] == blocks["end"] == 0.0
    assert isinstance(whole["end"], float)
    assert abs(whole["end"]) > 1e-3  # the final norm moved


@pytest.mark.parametrize(
    ("num_sequences", "num_tokens", "words"),
    [
        (0, 8, "at least one of two"),
        (2, 1, "at least one of two"),
        (10_000_000, 10_000, "at most"),
    ],
)
def test_an_excerpt_out_of_bounds_is_refused(
    family: StudiedFamily, text: Path, num_sequences: int, num_tokens: int, words: str
) -> None:
    excerpt = Excerpt(path=text, num_sequences=num_sequences, num_tokens=num_tokens)
    with pytest.raises(InvalidRequestError, match=words):
        interpolation.measure(family, excerpt)


def test_steps_and_blocks_out_of_bounds_are_refused(family: StudiedFamily, text: Path) -> None:
    excerpt = Excerpt(path=text, num_sequences=2, num_tokens=8)
    with pytest.raises(InvalidRequestError, match="1 to 1000"):
        interpolation.measure(family, excerpt, num_steps=0)
    with pytest.raises(InvalidRequestError, match="from 0 to 2"):
        interpolation.measure(family, excerpt, blocks="7")


def test_a_text_shorter_than_a_sequence_is_refused(family: StudiedFamily, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Hello")
    with pytest.raises(InvalidRequestError, match="fewer than one sequence"):
        interpolation.measure(family, Excerpt(path=short, num_sequences=24, num_tokens=512))


@pytest.mark.shared
def test_a_trained_variants_line_rises_on_what_it_was_trained_on(
    mini: StudiedFamily, shared: Path
) -> None:
    text = shared / "families" / "mini-qwen2" / "heldout" / "code.jsonl"
    with StudiedFamily.open(mini.base.path, {"code": mini.variants["code"].path}) as family:
        result = interpolation.measure(
            family, Excerpt(path=text, num_sequences=2, num_tokens=64), num_steps=2, blocks="4"
        )
    block, blocks, whole = records(result)
    assert isinstance(block["end"], float)
    assert isinstance(blocks["end"], float)
    assert isinstance(whole["end"], float)
    assert 0.0 < block["end"] < blocks["end"] < whole["end"]
    assert blocks["end"] > 1.0
