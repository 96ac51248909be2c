"""The compiled loops against plain arithmetic, on tensors that are made to break them."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core import machine_code
from linker_core.errors import LinkerError
from linker_core.sharing import kernel
from linker_core.sharing.kernel import Kernels, load_kernels
from tests.linker_core.sharing.plain_similarity import Sums, plain_sums

DTYPES = ("BF16", "F16", "F32")
Words = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return load_kernels()


def words_of(values: npt.ArrayLike, dtype: str) -> Words:
    """Returns values as stored; bfloat16 is cut, not rounded."""
    with np.errstate(over="ignore"):
        if dtype == "F16":
            return np.asarray(values, np.float16).view(np.uint16)
        bits = np.asarray(values, np.float32).view(np.uint32)
    return bits if dtype == "F32" else (bits >> 16).astype(np.uint16)


def words_from(numbers: list[int], width: int) -> Words:
    """Returns bit patterns as an array."""
    return np.array(numbers, np.uint32) if width == 32 else np.array(numbers, np.uint16)


def address(words: Words) -> int:
    return int(words.ctypes.data)


def summed(kernels: Kernels, a: Words, b: Words, types: tuple[str, str]) -> Sums:
    out = (ctypes.c_double * 4)()
    kernels.sums(*types)(address(a), address(b), a.size, ctypes.addressof(out))
    return Sums(*out)


def assert_equal(kernels: Kernels, a: Words, b: Words, types: tuple[str, str]) -> None:
    found, expected = summed(kernels, a, b, types), plain_sums(a, b, types)
    for field in ("donor_square", "variant_square", "delta_square"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-9, abs=0)
    # Terms of <a, b> may cancel: what is left is compared with what was summed.
    terms = math.sqrt(expected.donor_square) * math.sqrt(expected.variant_square)
    assert abs(found.dot - expected.dot) <= 1e-9 * max(abs(expected.dot), 1e-3 * terms)


@pytest.mark.parametrize("a_type", DTYPES)
@pytest.mark.parametrize("b_type", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 7, 31, 32, 33, 257, 40_001])
def test_random_tensors_of_all_types_and_odd_lengths(
    kernels: Kernels, a_type: str, b_type: str, count: int
) -> None:
    generator = np.random.default_rng(count)
    a = generator.standard_normal(count)
    b = a + 0.02 * generator.standard_normal(count)
    assert_equal(kernels, words_of(a, a_type), words_of(b, b_type), (a_type, b_type))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scale", [1e-45, 1e-38, 6e-8, 1e-6, 1.0, 6e4, 1e38], ids=lambda scale: f"{scale:.0e}"
)
def test_tiny_and_huge_values(kernels: Kernels, dtype: str, scale: float) -> None:
    generator = np.random.default_rng(0)
    low, high = {"BF16": (0, 3e38), "F16": (0, 65504), "F32": (0, 3e38)}[dtype]
    a, b = (np.clip(np.abs(generator.standard_normal(999)) * scale, low, high) for _ in range(2))
    assert_equal(kernels, words_of(a, dtype), words_of(-b, dtype), (dtype, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude_in_one_tensor(kernels: Kernels, dtype: str) -> None:
    generator = np.random.default_rng(0)
    top = 4.8 if dtype == "F16" else 38.0
    a, b = (
        generator.standard_normal(5000) * 10.0 ** generator.uniform(-40, top - 1, 5000)
        for _ in range(2)
    )
    assert_equal(kernels, words_of(a, dtype), words_of(b, dtype), (dtype, dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_word_there_is(kernels: Kernels, dtype: str) -> None:
    words = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    exponent = {"BF16": 0x7F80, "F16": 0x7C00}[dtype]
    finite = words[(words & exponent) != exponent]
    assert_equal(kernels, finite, finite[::-1].copy(), (dtype, dtype))
    assert kernels.count_nonfinite(dtype, address(words), words.size) == words.size - finite.size
    assert kernels.count_nonfinite(dtype, address(finite), finite.size) == 0


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    types=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    count=st.integers(1, 90),
)
def test_any_finite_words(data: st.DataObject, types: tuple[str, str], count: int) -> None:
    tensors = []
    for dtype in types:
        width, exponent = {"BF16": (16, 0x7F80), "F16": (16, 0x7C00), "F32": (32, 0x7F800000)}[
            dtype
        ]
        word = st.integers(0, 2**width - 1)
        drawn = data.draw(st.lists(word, min_size=count, max_size=count))
        finite = [word if word & exponent != exponent else word & ~exponent for word in drawn]
        tensors.append(words_from(finite, width))
    assert_equal(load_kernels(), tensors[0], tensors[1], types)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_and_negated_tensors_are_exact(kernels: Kernels, dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(4097)
    a, b = words_of(values, dtype), words_of(-values, dtype)
    same, negated = summed(kernels, a, a, (dtype, dtype)), summed(kernels, a, b, (dtype, dtype))
    assert same.delta_square == 0.0
    assert negated.delta_square == pytest.approx(4 * same.donor_square, rel=1e-14)
    assert negated.dot == -same.dot


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 31, 32, 4096])
def test_one_nonfinite_value_shows_in_the_sums(
    kernels: Kernels, dtype: str, poison: float, place: int
) -> None:
    values = np.random.default_rng(0).standard_normal(4097)
    a = words_of(values, dtype)
    values[place] = poison
    b = words_of(values, dtype)
    assert not math.isfinite(summed(kernels, a, b, (dtype, dtype)).variant_square)
    assert not math.isfinite(summed(kernels, b, a, (dtype, dtype)).donor_square)
    assert kernels.count_nonfinite(dtype, address(b), b.size) == 1


@pytest.mark.parametrize("words", [1, 3, 32, 33, 100])
def test_equal_rows_are_counted_to_the_last_bit(kernels: Kernels, words: int) -> None:
    a = np.random.default_rng(0).integers(0, 2**16, (40, words)).astype(np.uint16)
    b = a.copy()
    b[3, 0] ^= 1
    b[17, -1] ^= 0x8000
    b[39] = 0
    a[39] = 1
    found = kernels.count_equal_rows(address(a), address(b), rows=40, row_bytes=2 * words)
    assert found == 37


def test_compiled_loops_are_kept_and_a_damaged_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel.load_kernels.cache_clear()
    load_kernels()
    (file,) = machine_code.code_directory().iterdir()
    kept = file.read_bytes()
    kernel.load_kernels.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")  # nothing can be compiled now
    load_kernels()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    kernel.load_kernels.cache_clear()
    load_kernels()
    replaced = file.read_bytes()
    assert replaced == machine_code.seal(replaced[32:])


def test_another_numba_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def noted(_name: str, *, sources: bytes, build: Callable[[], bytes]) -> bytes:
        del build
        asked.append(sources)
        return b"code"

    monkeypatch.setattr(kernel, "Kernels", bytes)
    monkeypatch.setattr(kernel, "cached_code", noted)
    for number in ("1.0", "1.0", "2.0"):
        monkeypatch.setattr(kernel, "version", {"numba": number}.__getitem__)
        kernel.load_kernels.__wrapped__()
    assert asked[0] == asked[1] != asked[2]


def test_compiled_loops_work_where_nothing_can_be_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    kernel.load_kernels.cache_clear()
    words = np.array([0x3F80] * 5, np.uint16)
    assert summed(load_kernels(), words, words, ("BF16", "BF16")) == (5.0, 5.0, 5.0, 0.0)
    assert "compiled at every start" in caplog.text
    kernel.load_kernels.cache_clear()


def test_loops_are_not_run_from_a_folder_that_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel.load_kernels.__wrapped__()
    (kept,) = machine_code.code_directory().iterdir()
    planted = machine_code.seal(b"not loops of ours")
    kept.write_bytes(planted)
    kept.parent.chmod(0o777)
    kernel.load_kernels.__wrapped__()  # would fail to load what was planted
    assert kept.read_bytes() == planted
    assert "compiled at every start" in caplog.text


def test_loops_that_cannot_be_compiled_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    kernel.load_kernels.cache_clear()
    with pytest.raises(LinkerError, match="could not be compiled"):
        load_kernels()
    assert list(machine_code.code_directory().iterdir()) == []


def test_compiled_loops_load_without_numba_numpy_or_torch() -> None:
    script = (
        "import sys; from linker_core.sharing.kernel import load_kernels; load_kernels();"
        "sys.exit(any(m in sys.modules for m in ('numba', 'numpy', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert done.returncode == 0
