"""The compiled loops against plain arithmetic: every mix of types, odd lengths, many fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement, product

import numpy as np
import numpy.typing as npt
import pytest

from analysis import gram_kernel
from analysis.gram_kernel import Tile, Vectors, tile_loop, tiles
from tests.analysis.plain_gram import products_of
from tests.linker_core.sharing.plain_similarity import decoded
from tests.linker_core.sharing.test_kernel import Words, words_of

DTYPES = ("BF16", "F16", "F32")
POISON = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
Floats = npt.NDArray[np.float64]


def summed(words: Sequence[Words], dtypes: Sequence[str], *, run: int) -> Floats:
    """Returns the products of every pair of models, [runs, M, M], from all tiles."""
    num_models, count = len(words), words[0].size
    found = np.full((-(-count // run), num_models, num_models), np.nan)
    for tile in tiles(num_models - 1):
        sums = np.zeros((len(found), len(tile.products)))
        tile_loop(tile, dtypes).add(
            [words[model].ctypes.data for model in tile.models],
            count=count,
            run=run,
            sums=sums.ctypes.data,
        )
        for number, (i, j) in enumerate(tile.products):
            found[:, i, j] = found[:, j, i] = sums[:, number]
    return found


def random_words(dtypes: Sequence[str], count: int, seed: int) -> list[Words]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(count)
    return [words_of(base + 0.02 * rng.standard_normal(count), dtype) for dtype in dtypes]


def assert_products(
    found_MM: npt.NDArray[np.float64],
    words: Sequence[npt.NDArray[np.generic]],
    dtypes: Sequence[str],
) -> None:
    base_D, *variants = (
        decoded(w, dtype).astype(np.float64) for w, dtype in zip(words, dtypes, strict=True)
    )
    plain = products_of(base_D, np.stack([variant - base_D for variant in variants]))
    norms = np.sqrt(np.append(plain.base_square, plain.gram_NN.diagonal()))
    whole = np.block([
        [np.array([[plain.base_square]]), plain.base_dots_N[None]],
        [plain.base_dots_N[:, None], plain.gram_NN],
    ])  # fmt: skip
    assert (np.abs(found_MM - whole) <= 1e-14 * np.outer(norms, norms)).all()


@pytest.mark.parametrize("dtypes", list(product(DTYPES, repeat=3)))
@pytest.mark.parametrize("count", [1, 2, 16, 17, 18, 33, 257, 4_001])
def test_sums_of_every_mix_of_types_and_odd_lengths(dtypes: tuple[str, ...], count: int) -> None:
    words = random_words(dtypes, count, seed=count)
    assert_products(summed(words, dtypes, run=count)[0], words, dtypes)


@pytest.mark.parametrize("num_variants", [1, 2, 3, 4, 5, 6, 7, 11, 16])
def test_sums_of_any_number_of_fine_tunes(num_variants: int) -> None:
    dtypes = ["BF16", *(DTYPES[n % 3] for n in range(num_variants))]
    words = random_words(dtypes, 1_003, seed=num_variants)
    assert_products(summed(words, dtypes, run=1_003)[0], words, dtypes)


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("base", DTYPES)
def test_sums_of_cpus_with_fewer_and_narrower_registers(
    monkeypatch: pytest.MonkeyPatch, lanes: int, base: str
) -> None:
    monkeypatch.setattr(gram_kernel, "_vectors", lambda: Vectors(lanes=lanes, group=3))
    dtypes = [base, *DTYPES, "BF16"]
    words = random_words(dtypes, 1_003, seed=lanes)
    assert_products(summed(words, dtypes, run=1_003)[0], words, dtypes)


@pytest.mark.parametrize("num_variants", range(1, 40))
def test_tiles_hold_every_pair_once(num_variants: int) -> None:
    pairs = [pair for tile in tiles(num_variants) for pair in tile.products]
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) == set(combinations_with_replacement(range(num_variants + 1), 2))


def test_each_run_has_sums_of_its_own_and_a_second_call_adds_to_them() -> None:
    dtypes = ("BF16", "BF16", "F32")
    words = random_words(dtypes, 1_000, seed=3)
    runs = summed(words, dtypes, run=300)
    assert len(runs) == 4
    for number, found in enumerate(runs):
        part = [w[300 * number : 300 * (number + 1)] for w in words]
        assert_products(found, part, dtypes)
    tile = Tile((0, 1), ((0, 0), (0, 1), (1, 1)))
    loop, sums = tile_loop(tile, dtypes[:2]), np.zeros(3)
    for start in (0, 300):
        places = [w[start:].ctypes.data for w in words[:2]]
        loop.add(places, count=300, run=300, sums=sums.ctypes.data)
    assert np.allclose(sums, (runs[0] + runs[1])[[0, 0, 1], [0, 1, 1]], rtol=1e-14)


@pytest.mark.parametrize(
    "dtypes", [("BF16",) * 3, ("F16",) * 3, ("F32",) * 3, ("F32", "BF16", "F16")]
)
def test_nothing_outside_the_stretch_is_read_into_sums(dtypes: tuple[str, ...]) -> None:
    inside = random_words(dtypes, 131, seed=5)
    padded = [
        np.concatenate([np.full(40, POISON[d], w.dtype), w, np.full(40, POISON[d], w.dtype)])
        for w, d in zip(inside, dtypes, strict=True)
    ]
    assert_products(summed([w[40:171] for w in padded], dtypes, run=64).sum(axis=0), inside, dtypes)


@pytest.mark.parametrize(
    ("dtype", "word"), [("BF16", 0x7F80), ("F16", 0x7E01), ("F32", 0xFF800000)]
)
@pytest.mark.parametrize("place", [0, 1, 2, 70, 130])
def test_what_is_not_finite_shows_in_its_models_square(dtype: str, word: int, place: int) -> None:
    dtypes = ("BF16", dtype, dtype)
    words = random_words(dtypes, 131, seed=5)
    words[2][place] = word
    squares = np.diagonal(summed(words, dtypes, run=131)[0])
    assert list(np.isfinite(squares)) == [True, True, False]


def test_the_largest_finite_weights_do_not_overflow() -> None:
    words = [words_of(np.full(4_096, x), "F32") for x in (3.4e38, -3.4e38)]
    assert np.isfinite(summed(words, ("F32", "F32"), run=4_096)).all()
