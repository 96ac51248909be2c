"""Exported checkpoints hold base + scale · kernel, rounded once, and are checkpoints."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.kernel.apply import kernel_delta
from analysis.kernel.export import RECORD_FILE, export_kernel, rounded_words
from analysis.kernel.kernel import Kernel, build_kernel
from analysis.selection import select
from analysis.tensors import read_tensor
from linker_core.errors import ConflictError, InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.checkpoint import Checkpoint
from tests.analysis.planted import Planted, plant_family
from tests.tiny import make_checkpoint, save_state


def _kernel(family: StudiedFamily) -> Kernel:
    grams = gram_pass(family, select(family.base))
    return build_kernel(grams, names=family.names, seed=0)


def _values(words: NDArray[np.generic]) -> NDArray[np.float64]:
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


@given(
    st.lists(
        st.floats(-3e38, 3e38) | st.floats(-2.0, 2.0) | st.floats(-1e-37, 1e-37),
        min_size=1,
        max_size=20,
    )
)
def test_bf16_words_are_the_nearest(values: list[float]) -> None:
    words = rounded_words(np.array(values), "BF16")
    assert words is not None
    for value, word in zip(values, words.astype(int), strict=True):
        near = Fraction(float(_values(np.array([word]))[0]))
        for step in (-1, 1):
            if (word & 0x7FFF) == 0 and step < 0:
                continue  # the word below zero is of the other sign
            other_word = word + step
            if (other_word & 0x7F80) == 0x7F80:
                continue
            other = Fraction(float(_values(np.array([other_word]))[0]))
            here, there = abs(Fraction(value) - near), abs(Fraction(value) - other)
            assert here < there or (here == there and word % 2 == 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_bf16_words_are_rounded_once_and_ties_go_to_even(sign: int) -> None:
    step = 2.0**-7  # of bf16 above 1
    tie, beyond, short = 1 + step / 2, 1 + step / 2 + 2.0**-50, 1 + 1.5 * step - 2.0**-50
    words = rounded_words(sign * np.array([tie, beyond, short, 1 + 1.5 * step]), "BF16")
    assert words is not None
    # Through a float32 rounded as usual, the second would be a tie and fall to 1.
    expected = [1, 1 + step, 1 + step, 1 + 2 * step]
    np.testing.assert_array_equal(_values(words), sign * np.array(expected))


@pytest.mark.parametrize(("dtype", "largest"), [("BF16", 3.39e38), ("F16", 65504), ("F32", 3.4e38)])
def test_values_beyond_the_type_have_no_words(dtype: str, largest: float) -> None:
    assert rounded_words(np.array([largest, -largest]), dtype) is not None
    assert rounded_words(np.array([0.0, -largest * 1.01]), dtype) is None
    assert rounded_words(np.array([1e300]), dtype) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_is_base_plus_kernel_in_the_bases_type(tmp_path: Path, dtype: str) -> None:
    planted = plant_family(tmp_path, dtype=dtype, layers=1)
    with planted.open() as family:
        kernel = _kernel(family)
        export_kernel(family, kernel, tmp_path / "out", scale=0.75)
        with Checkpoint.open(tmp_path / "out") as written:
            assert written.tensors == family.base.tensors
            for name in family.base.tensors:
                base, found = read_tensor(family.base, name), read_tensor(written, name)
                if name not in kernel.tensors:
                    np.testing.assert_array_equal(found, base)
                    continue
                assert np.any(found != base)
                exact = base.astype(np.float64) + 0.75 * kernel_delta(family, kernel, name)
                half_step = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
                np.testing.assert_allclose(found, exact, rtol=1.01 * half_step, atol=1e-7)


def test_export_keeps_a_head_that_is_stored_though_tied(tmp_path: Path) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    paths = [make_checkpoint(tmp_path / name, tie=True) for name in ("base", "one", "two")]
    for number, path in enumerate(paths):
        state = load_file(path / "model.safetensors")
        state[embedding] = state[embedding] * (1 + 0.01 * number)
        save_state(path, state | {head: state[embedding].clone()})
    with StudiedFamily.open(paths[0], {path.name: path for path in paths[1:]}) as family:
        grams = gram_pass(family, select(family.base, ["*embed*"]))
        kernel = build_kernel(grams, names=family.names, seed=0)
        export_kernel(family, kernel, tmp_path / "out", scale=1.0)
    written, base = (load_file(path / "model.safetensors") for path in (tmp_path / "out", paths[0]))
    assert torch.equal(written[head], written[embedding])
    assert not torch.equal(written[embedding], base[embedding])


def test_export_at_scale_zero_is_the_base(small_family: Planted, tmp_path: Path) -> None:
    with small_family.open() as family:
        export_kernel(family, _kernel(family), tmp_path / "out", scale=0.0)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (small_family.base / weights).read_bytes()


def test_export_comes_with_tokenizer_and_record(small_family: Planted, tmp_path: Path) -> None:
    with small_family.open() as family:
        kernel = _kernel(family)
        export_kernel(family, kernel, tmp_path / "out", scale=1.5)
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert record["alpha"] == 1.5
    assert record["kernel"] == json.loads(json.dumps(kernel.to_json()))
    base, copy = (Tokenizer.load(path) for path in (small_family.base, tmp_path / "out"))
    assert copy.encode("word", add_special_tokens=False) == base.encode(
        "word", add_special_tokens=False
    )


def test_export_into_a_folder_that_exists_is_refused(small_family: Planted, tmp_path: Path) -> None:
    with small_family.open() as family, pytest.raises(ConflictError):
        export_kernel(family, _kernel(family), tmp_path, scale=1.0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e300])
def test_scale_out_of_range_is_refused_and_leaves_nothing(
    small_family: Planted, tmp_path: Path, scale: float
) -> None:
    with small_family.open() as family, pytest.raises(InvalidRequestError, match="scale"):
        export_kernel(family, _kernel(family), tmp_path / "out", scale=scale)
    assert not list(tmp_path.iterdir())
