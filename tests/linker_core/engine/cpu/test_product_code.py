"""Products against float64, and each row against itself in every other batch."""

from __future__ import annotations

import pytest
import torch

from linker_core.engine.cpu.kernels import can_round
from linker_core.engine.cpu.product_code import PIECE_ROWS
from tests.linker_core.engine.cpu.products import (
    DTYPES,
    TILINGS,
    Weight,
    before_an_unreadable_page,
    exact,
    multiply,
    size_of_terms,
)

needs_rounding = pytest.mark.skipif(not can_round(), reason="no units for bfloat16")
# Outputs below, at and beyond a piece, and not a multiple of any tile.
OUTS = (1, 5, PIECE_ROWS, PIECE_ROWS + 1, 131)


def random_weight(num_out: int, width: int, dtype: str, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_out, width, generator=generator).to(DTYPES[dtype])


def random_rows(num_rows: int, width: int) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows + width))


def assert_exact(y_TO: torch.Tensor, x_TI: torch.Tensor, weight: Weight) -> None:
    error_TO = (y_TO.double() - exact(x_TI, weight)).abs()
    # Every lane sums its products one after the other, with one rounding each.
    assert (error_TO <= 2e-6 * size_of_terms(x_TI, weight) + 1e-6).all()


@pytest.mark.parametrize("width", [1, 7, 16, 33, 48, 99, 256])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("lanes", list(TILINGS))
def test_product_of_any_width_is_that_of_float64(lanes: int, dtype: str, width: int) -> None:
    for num_rows in (1, 3, 6, 7, 13):
        x_TI = random_rows(num_rows, width)
        for num_out in OUTS:
            weight = Weight(random_weight(num_out, width, dtype))
            (y_TO,) = multiply(x_TI, [weight], lanes=lanes)
            assert_exact(y_TO, x_TI, weight)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_several_weights_share_their_rows(dtype: str, num_threads: int) -> None:
    width = 40
    for num_rows in (2, 9):
        x_TI = random_rows(num_rows, width)
        weights = [
            Weight(random_weight(num_out, width, dtype, seed=n)) for n, num_out in enumerate(OUTS)
        ]
        ys = multiply(x_TI, weights, num_threads=num_threads)
        for weight, y_TO in zip(weights, ys, strict=True):
            assert_exact(y_TO, x_TI, weight)
            (alone_TO,) = multiply(x_TI, [weight])
            assert torch.equal(y_TO, alone_TO)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("lanes", list(TILINGS))
def test_bias_of_all_rows_and_biases_by_row_are_added(lanes: int, dtype: str) -> None:
    width, num_rows = 24, 8
    x_TI = random_rows(num_rows, width)
    biases = list(random_weight(num_rows, PIECE_ROWS + 5, dtype, seed=3))
    words_OI = random_weight(PIECE_ROWS + 5, width, dtype)
    for bias in (biases[0], biases):
        plain, weight = Weight(words_OI), Weight(words_OI, bias)
        without_TO, y_TO = multiply(x_TI, [plain, weight], lanes=lanes, num_threads=2)
        assert_exact(y_TO, x_TI, weight)
        for row in range(num_rows):
            bias_O = weight.bias_of(row)
            assert bias_O is not None
            assert torch.equal(y_TO[row], without_TO[row] + bias_O.float())


def test_named_rows_are_read_and_written_where_they_lie_with_their_own_bias() -> None:
    width, rows = 40, [9, 2, 3, 11, 0, 7, 5]
    x_TI = random_rows(12, width)
    biases = list(random_weight(len(rows), 10, "BF16", seed=5))
    weight = Weight(random_weight(10, width, "BF16"), biases)
    (y_TO,) = multiply(x_TI, [weight], rows=rows)
    (gathered_TO,) = multiply(x_TI[rows].contiguous(), [weight])
    assert torch.equal(y_TO[rows], gathered_TO)


def test_rows_of_x_may_lie_apart() -> None:
    wide, weight = random_rows(7, 100), Weight(random_weight(9, 40, "BF16"))
    (apart_TO,) = multiply(wide[:, 30:70], [weight])
    (dense_TO,) = multiply(wide[:, 30:70].contiguous(), [weight])
    assert torch.equal(apart_TO, dense_TO)


@pytest.mark.parametrize("width", [5, 31, 32, 41])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("lanes", list(TILINGS))
def test_nothing_behind_a_weights_or_biases_last_word_is_read(
    lanes: int, dtype: str, width: int
) -> None:
    words_OI = before_an_unreadable_page(random_weight(7, width, dtype))
    bias_O = before_an_unreadable_page(random_weight(1, 7, dtype, seed=2)[0])
    for num_rows in (1, 8):
        x_TI = random_rows(num_rows, width)
        weight = Weight(words_OI, bias_O)
        (y_TO,) = multiply(x_TI, [weight], lanes=lanes)
        assert_exact(y_TO, x_TI, weight)


def test_nothing_behind_a_row_of_x_is_read() -> None:
    x_TI = before_an_unreadable_page(random_rows(3, 37))
    weight = Weight(random_weight(4, 37, "BF16"))
    (y_TO,) = multiply(x_TI, [weight])
    assert_exact(y_TO, x_TI, weight)


def test_a_neighbour_that_is_not_a_number_changes_nothing() -> None:
    """What lies behind a row's last element, in x and in the weight, has no part in its sums."""
    width = 37
    x_TI, words_OI = random_rows(9, width), random_weight(60, width, "BF16")
    (good_TO,) = multiply(x_TI, [Weight(words_OI)])
    for row in (0, 4, 8):
        bad_TI = x_TI.clone()
        bad_TI[row] = float("nan")
        (y_TO,) = multiply(bad_TI, [Weight(words_OI)])
        assert y_TO[row].isnan().all()
        others = [r for r in range(9) if r != row]
        assert torch.equal(y_TO[others], good_TO[others])
    bad_OI = words_OI.clone()
    bad_OI[31] = float("nan")
    (y_TO,) = multiply(x_TI, [Weight(bad_OI)])
    assert y_TO[:, 31].isnan().all()
    others = [o for o in range(60) if o != 31]
    assert torch.equal(y_TO[:, others], good_TO[:, others])


# Vectors of so many sums; pairs of bfloat16 are multiplied in sixteen.
KINDS = [*((lanes, False) for lanes in TILINGS), pytest.param(16, True, marks=needs_rounding)]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("lanes", "rounded"), KINDS)
def test_a_row_is_the_same_in_every_batch_order_and_on_every_thread(
    lanes: int, num_threads: int, rounded: bool
) -> None:
    width, most = 75, 20
    x_TI = random_rows(most, width)
    biases = list(random_weight(most, 101, "BF16", seed=4))
    words_OI = random_weight(101, width, "BF16")
    alone = [
        multiply(x_TI[n : n + 1], [Weight(words_OI, biases[n])], lanes=lanes, rounded=rounded)[0][0]
        for n in range(most)
    ]
    generator = torch.Generator().manual_seed(1)
    for num_rows in range(1, most + 1):
        rows = torch.randperm(most, generator=generator)[:num_rows].tolist()
        weight = Weight(words_OI, [biases[row] for row in rows])
        (y_TO,) = multiply(
            x_TI, [weight], rows=rows, lanes=lanes, rounded=rounded, num_threads=num_threads
        )
        for row in rows:
            assert torch.equal(y_TO[row], alone[row])


@needs_rounding
@pytest.mark.parametrize("width", [1, 7, 31, 32, 48, 99, 256])
def test_rounded_products_are_those_of_rows_rounded_to_bfloat16(width: int) -> None:
    for num_rows in (1, 5, 13):
        x_TI = random_rows(num_rows, width)
        weight = Weight(random_weight(131, width, "BF16"))
        (y_TO,) = multiply(x_TI, [weight], rounded=True)
        assert_exact(y_TO, x_TI.bfloat16(), weight)
        error_TO = (y_TO.double() - exact(x_TI, weight)).abs()
        # bfloat16 keeps eight bits: half a unit of the last is 2**-8 of the number at most.
        assert (error_TO <= 1.001 * 2**-8 * size_of_terms(x_TI, weight) + 1e-6).all()


@needs_rounding
@pytest.mark.parametrize("width", [5, 31, 32, 41])
def test_nothing_behind_a_rounded_products_weight_is_read(width: int) -> None:
    weight = Weight(before_an_unreadable_page(random_weight(7, width, "BF16")))
    x_TI = random_rows(3, width)
    (y_TO,) = multiply(x_TI, [weight], rounded=True)
    assert_exact(y_TO, x_TI.bfloat16(), weight)
