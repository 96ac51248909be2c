"""A kernel put on a base's model at several scales, and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.evaluation.outputs import (
    greedy_outputs,
    load_prompts,
    repeated_share,
)
from analysis.evaluation.perplexity import Protocol
from analysis.evaluation.suite import EncodedSuite, Suite, SuiteFiles
from analysis.evaluation.sweep import (
    changes,
    check_scales,
    companion,
    measure_base,
    measure_models,
    sweep,
)
from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.kernel.kernel import Kernel, Weighting, build_kernel
from analysis.kernel.put import put_kernel
from analysis.model import StudyModel
from analysis.selection import select
from analysis.tensors import read_tensor
from linker_core.errors import InvalidRequestError
from tests.analysis.planted import Planted


@pytest.fixture
def family(small_family: Planted) -> Iterator[StudiedFamily]:
    with small_family.open() as family:
        yield family


@pytest.fixture
def kernel(family: StudiedFamily) -> Kernel:
    return build_kernel(gram_pass(family, select(family.base)), names=family.names, seed=1)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "text.txt").write_text("The sun rose over the hills and the sea was calm. " * 8)
    records = [{"instruction": f"Say {i}", "output": f"{i} and more"} for i in range(4)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    rows = "".join(f"Which is {n}?,{n},no,yes,maybe,{'ABCD'[n % 4]}\n" for n in range(6))
    (tmp_path / "sums_test.csv").write_text(rows)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [{"query": f"It is {n}", "choices": ["so", "not so"], "gold": n % 2} for n in range(5)]
    (tasks / "so.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Suite.load(
        SuiteFiles(
            wikitext=tmp_path / "text.txt",
            instruct=tmp_path / "alpaca.json",
            mmlu=tmp_path,
            tasks=tasks,
            subjects=("sums",),
            protocols=tuple(Protocol),
            num_tokens=120,
            window=40,
            full_length=60,
        )
    )


def _encoded(suite: Suite, family: StudiedFamily) -> tuple[StudyModel, EncodedSuite]:
    model = StudyModel.open(family.base)
    return model, EncodedSuite(suite, model.tokenizer, model.config)


def test_a_text_of_one_token_is_refused(family: StudiedFamily, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    suite = Suite.load(SuiteFiles(wikitext=tmp_path / "a.txt"))
    with pytest.raises(InvalidRequestError, match="has 1 token"):
        _encoded(suite, family)


def test_the_raw_mean_at_one_is_the_mean_of_the_models(
    family: StudiedFamily, kernel: Kernel
) -> None:
    model = StudyModel.open(family.base)
    put_kernel(model, family, companion(kernel, Weighting.RAW_MEAN), scale=1.0)
    name = next(iter(kernel.tensors))
    mean = np.mean([read_tensor(one, name) for one in family.variants.values()], axis=0)
    np.testing.assert_allclose(model.get(name).numpy(), mean, rtol=1e-5, atol=1e-6)


def test_a_sweep_measures_every_weighting_at_every_scale_and_leaves_the_base(
    family: StudiedFamily, kernel: Kernel, suite: Suite
) -> None:
    model, encoded = _encoded(suite, family)
    baseline = measure_base(model, encoded)
    heard: list[str] = []
    rows = list(sweep(model, family, kernel, encoded, scales=(0.0, 2.0), told=heard.append))
    assert [(row.label, row.scale) for row in rows] == [
        (weighting, scale) for weighting in Weighting for scale in (0.0, 2.0)
    ]
    assert len(heard) == len(rows)
    for row in rows[::2]:  # scale 0 is the base
        assert row.scores == baseline.scores
    for row in rows[1::2]:
        assert row.scores.text != baseline.scores.text
    norms = {row.label: row.norm for row in rows if row.scale}
    assert norms["sampled"] == pytest.approx(norms["uniform"])
    assert norms["sampled"] == pytest.approx(2 * kernel.norm)
    for name in model.names:
        assert torch.equal(model.get(name), torch.from_numpy(read_tensor(family.base, name)))


def test_scores_of_a_sweep_are_those_of_the_model_they_say(
    family: StudiedFamily, kernel: Kernel, suite: Suite
) -> None:
    model, encoded = _encoded(suite, family)
    (row,) = sweep(model, family, kernel, encoded, scales=(3.0,), weightings=(Weighting.UNIFORM,))
    put_kernel(model, family, kernel.uniform(), scale=3.0)
    assert row.scores == encoded.measure(model)


def test_changes_name_every_metric_and_are_none_from_the_model_to_itself(
    family: StudiedFamily, suite: Suite
) -> None:
    model, encoded = _encoded(suite, family)
    scores = encoded.measure(model)
    still = {"percent": 0, "low": 0, "high": 0}
    unmoved = {"points": 0, "stderr": 0}
    assert changes(scores, scores) == {
        "wikitext_sliding_window": still,
        "wikitext_full_sequence": still,
        "instruct_record": still,
        "instruct_response": still,
        "mmlu": unmoved,
        "tasks": unmoved,
    }


def test_fine_tunes_are_measured_as_they_are(family: StudiedFamily, suite: Suite) -> None:
    _, encoded = _encoded(suite, family)
    rows = list(measure_models(family, encoded, device="cpu", dtype=torch.float32))
    assert [row.label for row in rows] == list(family.names)
    for row, checkpoint in zip(rows, family.variants.values(), strict=True):
        assert row.scores == encoded.measure(StudyModel.open(checkpoint))


def test_a_fine_tune_of_a_shorter_context_is_refused_before_any_is_measured(
    family: StudiedFamily, suite: Suite, tmp_path: Path
) -> None:
    """Beyond its context a model computes numbers, too, that say nothing of it."""
    _, encoded = _encoded(suite, family)
    short = tmp_path / "short"
    shutil.copytree(family.base.path, short)
    config = json.loads((short / "config.json").read_text())
    heard: list[str] = []
    for context, refused in ((encoded.longest, False), (encoded.longest - 1, True)):
        (short / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": context})
        )
        variants = {"whole": family.base.path, "short": short}
        with StudiedFamily.open(family.base.path, variants) as shorter:
            rows = measure_models(
                shorter, encoded, device="cpu", dtype=torch.float32, told=heard.append
            )
            if not refused:
                assert len(list(rows)) == 2
                heard.clear()
                continue
            with pytest.raises(InvalidRequestError, match=f"short: its context is {context} tok"):
                list(rows)
            with pytest.raises(InvalidRequestError, match="--window"):
                encoded.measure(StudyModel.open(shorter.variants["short"]))
    assert not heard


def test_the_longest_sequence_is_that_of_what_is_read(family: StudiedFamily, suite: Suite) -> None:
    model, encoded = _encoded(suite, family)
    seen: list[int] = []
    hidden = model.hidden

    def counted(ids_BT: torch.Tensor) -> torch.Tensor:
        seen.append(ids_BT.shape[1])
        return hidden(ids_BT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "hidden", counted)
        encoded.measure(model)
    assert encoded.longest == max(seen)


def test_a_suite_says_what_it_measures(family: StudiedFamily, suite: Suite) -> None:
    _, encoded = _encoded(suite, family)
    said = " ".join(encoded.notes)
    assert "120 tokens in windows of 40 tokens, stride 20" in said
    assert "full sequences of 60 tokens" in said
    assert "4 records" in said


def test_a_suite_without_files_or_out_of_bounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="Nothing to measure"):
        Suite.load(SuiteFiles())
    for given in (
        {"num_tokens": 1}, {"window": 1}, {"full_length": 0}, {"full_length": 1},
        {"num_questions": 0}, {"num_instructions": 0},
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError, match="expected"):
            Suite.load(SuiteFiles(wikitext=tmp_path / "text.txt", **given))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"  \n"])
def test_a_text_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(InvalidRequestError, match=r"--wikitext text\.txt"):
        Suite.load(SuiteFiles(wikitext=tmp_path / "text.txt"))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e9])
def test_scales_that_are_no_sensible_numbers_are_refused(scale: float) -> None:
    with pytest.raises(InvalidRequestError, match="--scales"):
        check_scales([1.0, scale])


def test_answers_come_scale_by_scale_and_at_zero_are_the_bases(
    family: StudiedFamily, kernel: Kernel
) -> None:
    model = StudyModel.open(family.base)
    prompts = ["Good day", "The sea"]
    outputs = list(greedy_outputs(model, family, kernel, prompts, scales=(0.0, 50.0), max_tokens=6))
    assert [(o.scale, o.prompt) for o in outputs] == [(s, p) for s in (0.0, 50.0) for p in prompts]
    ids = model.tokenizer.encode("Good day", add_special_tokens=True)
    assert outputs[0].text == model.tokenizer.decode(model.greedy(ids, max_tokens=6))
    assert outputs[0].text != outputs[2].text
    name = next(iter(kernel.tensors))
    assert torch.equal(model.get(name), torch.from_numpy(read_tensor(family.base, name)))
    assert set(outputs[0].to_json()) == {"prompt", "scale", "text", "num_tokens", "repeated"}


def test_a_prompt_that_fills_the_context_is_refused(family: StudiedFamily, kernel: Kernel) -> None:
    model = StudyModel.open(family.base)
    with pytest.raises(InvalidRequestError, match="prompt"):
        list(greedy_outputs(model, family, kernel, ["word " * 300]))


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0), ([1, 2, 3, 4], 0), ([1, 2, 3, 4, 5, 6], 0), ([7] * 8, 0.8), ([1, 2] * 4, 0.6)],
)
def test_repetition_is_the_share_of_runs_seen_before(ids: list[int], share: float) -> None:
    assert repeated_share(ids) == pytest.approx(share)


def test_prompts_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n\n{"prompt": "two", "kind": "x"}\n')
    assert load_prompts(path) == ["one", "two"]
    for bad in ("3", '" "', '{"text": "a"}', "one"):
        path.write_text(bad)
        with pytest.raises(InvalidRequestError, match="line 1"):
            load_prompts(path)
