"""Answers with and without the base's blocks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from analysis.family import StudiedFamily
from analysis.probes import generation_overlap
from analysis.probes.generation_overlap import COLUMNS, block_tensors, measure, overlap
from linker_core.errors import InvalidRequestError, LinkerError
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture(scope="module")
def family_paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("overlap")
    base = make_checkpoint(folder / "base", tie=False)  # tied heads repeat what they read
    outside = {"model.embed_tokens.weight": 0.2, "lm_head.weight": 0.2, "model.norm.weight": 0.2}
    return base, {
        "outside": make_variant(folder / "outside", base, scale=outside),
        "far": make_variant(folder / "far", base, scale=0.8, seed=2),
    }


def test_only_what_blocks_change_changes_answers(
    family_paths: tuple[Path, dict[str, Path]],
) -> None:
    base, variants = family_paths
    with StudiedFamily.open(base, variants) as family:
        result = measure(family, num_prompts=3, max_tokens=12)
    same, far = (dict(zip(COLUMNS, row, strict=True)) for row in result.rows)
    assert (same["variant"], same["prompts"], same["first_differs"]) == ("outside", 3, 12)
    assert (same["rouge_l"], same["exact_answers"], same["equal_tokens"]) == (1, 1, 1)
    assert far["exact_answers"] == 0
    assert result.facts["mean_exact_answers"] == 0.5


def test_prompts_of_a_file_are_asked(
    family_paths: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(f"Say {n}") for n in range(5)))
    base, variants = family_paths
    with StudiedFamily.open(base, variants) as family:
        result = measure(family, tmp_path / "prompts.jsonl", num_prompts=4, max_tokens=2)
        assert [row[1] for row in result.rows] == [4, 4]
        (tmp_path / "prompts.jsonl").write_text(json.dumps("long " * 100))
        with pytest.raises(InvalidRequestError, match="tokens"):
            measure(family, tmp_path / "prompts.jsonl", max_tokens=2)
        with pytest.raises(InvalidRequestError, match="0 prompts"):
            measure(family, num_prompts=0)


def test_overlap_counts_tokens_and_texts() -> None:
    found = overlap(
        [[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 5]], ["a b c d", "e f g h"], ["a x c d", "e f g h"]
    )
    assert found.exact_answers == 0.5
    assert found.equal_tokens == pytest.approx(4 / 5)
    assert found.first_differs == pytest.approx((1 + 2) / 2)
    assert found.rouge_l == pytest.approx((3 / 4 + 1) / 2)
    # Of 8 words 7 are found, of 6 pairs 4, of 4 triples 2, of 2 quadruples 1; equal lengths.
    assert found.bleu == pytest.approx((7 / 8 * 4 / 6 * 2 / 4 * 1 / 2) ** 0.25)


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(LinkerError, match=r"linker-llm\[bleu\]"):
        overlap([[1]], [[1]], ["a"], ["a"])


def test_without_sacrebleu_no_model_is_loaded_first(
    family_paths: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    monkeypatch.setattr(generation_overlap, "open_model", pytest.fail)
    base, variants = family_paths
    with (
        StudiedFamily.open(base, variants) as family,
        pytest.raises(LinkerError, match=r"linker-llm\[bleu\]"),
    ):
        measure(family)


def test_blocks_are_all_but_embedding_norm_and_head(
    family_paths: tuple[Path, dict[str, Path]],
) -> None:
    with Checkpoint.open(family_paths[0]) as checkpoint:
        outside = set(checkpoint.tensors) - set(block_tensors(checkpoint))
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
