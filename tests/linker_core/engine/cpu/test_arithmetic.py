"""What only compiled arithmetic has: rows that never change, buffers that stay, recorded steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch

from linker_core.engine.arithmetic import ByRow, Norm, Product
from linker_core.engine.cpu import arithmetic as module
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.cpu.kernels import can_round
from linker_core.engine.cpu.regions import Call, Region
from linker_core.engine.rows import RowGroup
from tests.linker_core.engine.attending import Attending, empty_cache, shape_of

WIDTH = 40


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(num_rows: int) -> RowGroup:
    return RowGroup(torch.arange(num_rows), slice(0, num_rows))


class Layer:
    """A norm, a product, a gate and a sum, over buffers."""

    def __init__(self, arithmetic: CompiledArithmetic, *, bias: torch.Tensor | None = None) -> None:
        self.arithmetic = arithmetic
        self.norm = random(WIDTH, seed=1, dtype=torch.bfloat16)
        self.weight = random(2 * WIDTH, WIDTH, seed=2, dtype=torch.bfloat16)
        self.bias = None if bias is None else ByRow([bias], None)
        self.num_bodies = 0

    def compute(self, x_TH: torch.Tensor, key: str | int | None) -> torch.Tensor:
        """Returns what the layer makes of x, run under a key."""
        num_rows = len(x_TH)
        rows = whole(num_rows)
        stream = self.arithmetic.buffer("x", num_rows, WIDTH, x_TH).copy_(x_TH)

        def body() -> None:
            self.num_bodies += 1
            normed = self.arithmetic.buffer("normed", num_rows, WIDTH, x_TH)
            self.arithmetic.normalize(
                stream, ByRow([self.norm], None), Norm(1e-6, plus_one=False), normed
            )
            both = self.arithmetic.buffer("both", num_rows, 2 * WIDTH, x_TH)
            self.arithmetic.multiply(normed, rows, [Product(self.weight, both, self.bias)])
            self.arithmetic.gate(both[:, :WIDTH], both[:, WIDTH:], "silu")
            self.arithmetic.add(stream, both[:, :WIDTH])

        self.arithmetic.run(key, body)
        return stream.clone()


def ready_layer(num_rows: int) -> Layer:
    """A layer whose buffers have room for so many rows: a step that makes room is not recorded."""
    layer = Layer(CompiledArithmetic())
    layer.compute(random(num_rows, WIDTH, seed=0), None)
    layer.num_bodies = 0
    return layer


def test_recorded_step_is_replayed_over_new_rows() -> None:
    layer, plain = ready_layer(4), Layer(CompiledArithmetic())
    for seed in range(5):
        x_TH = random(4, WIDTH, seed=seed)
        assert torch.equal(layer.compute(x_TH, "key"), plain.compute(x_TH, None))
    assert (layer.num_bodies, plain.num_bodies) == (1, 5)


def test_steps_of_other_sizes_have_recordings_of_their_own() -> None:
    layer, plain = ready_layer(9), Layer(CompiledArithmetic())
    for num_rows in (9, 2, 5, 2, 9, 5):
        x_TH = random(num_rows, WIDTH, seed=num_rows)
        assert torch.equal(layer.compute(x_TH, num_rows), plain.compute(x_TH, None))
    assert layer.num_bodies == 3


def test_buffer_that_grows_ends_what_was_recorded() -> None:
    layer, plain = ready_layer(1), Layer(CompiledArithmetic())
    for num_rows in (1, 1, 40, 1, 40, 1, 40):
        x_TH = random(num_rows, WIDTH, seed=num_rows)
        assert torch.equal(layer.compute(x_TH, num_rows), plain.compute(x_TH, None))
    # One row before and behind the growth, forty while growing and behind it.
    assert layer.num_bodies == 4


def test_buffer_keeps_its_place_while_it_is_large_enough() -> None:
    arithmetic, like = CompiledArithmetic(), torch.empty(0)
    large = arithmetic.buffer("a", 20, 8, like)
    other = arithmetic.buffer("b", 20, 8, like)
    assert arithmetic.buffer("a", 3, 8, like).data_ptr() == large.data_ptr()
    assert other.data_ptr() != large.data_ptr()
    assert arithmetic.buffer("a", 200, 8, like).shape == (200, 8)


def test_bias_that_torch_adds_is_never_recorded() -> None:
    bias = random(2 * WIDTH, seed=5)  # float32 beside bfloat16 words
    layer = Layer(CompiledArithmetic(), bias=bias)
    plain = Layer(CompiledArithmetic(), bias=bias)
    for seed in range(3):
        x_TH = random(4, WIDTH, seed=seed)
        assert torch.equal(layer.compute(x_TH, "key"), plain.compute(x_TH, None))
    assert layer.num_bodies == 3


def test_forgotten_recording_is_made_anew_with_the_weights_of_now() -> None:
    layer, x_TH = ready_layer(4), random(4, WIDTH, seed=0)
    before = layer.compute(x_TH, "key")
    layer.weight = random(2 * WIDTH, WIDTH, seed=7, dtype=torch.bfloat16)
    layer.arithmetic.forget()
    after = layer.compute(x_TH, "key")
    assert layer.num_bodies == 2
    assert not torch.equal(before, after)
    assert torch.equal(after, layer.compute(x_TH, None))


def test_forgotten_recording_keeps_no_weight() -> None:
    layer = ready_layer(4)
    arithmetic = layer.arithmetic
    layer.compute(random(4, WIDTH, seed=0), "key")
    weight = weakref.ref(layer.weight)
    arithmetic.forget()
    del layer
    gc.collect()
    assert weight() is None


def test_only_the_latest_recordings_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_TAPES", 2)
    layer, x_TH = ready_layer(4), random(4, WIDTH, seed=0)
    for key in ("a", "b", "a", "c", "a", "b"):  # b was used longest ago when c came
        layer.compute(x_TH, key)
    assert layer.num_bodies == 4


def test_failing_body_leaves_nothing_recorded() -> None:
    layer, x_TH = ready_layer(4), random(4, WIDTH, seed=0)

    def fail() -> None:
        layer.arithmetic.add(x_TH.clone(), x_TH)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        layer.arithmetic.run("key", fail)
    layer.compute(x_TH, "key")
    assert layer.num_bodies == 1


@pytest.mark.parametrize("window", [None, 9])
def test_recorded_attention_follows_positions_and_pages(window: int | None) -> None:
    recorded, plain = (Attending(CompiledArithmetic(), shape_of(window=window)) for _ in range(2))
    for attending, key in ((recorded, "key"), (plain, None)):
        sequences = [attending.sequence(30, seed=seed) for seed in (1, 2, 3)]
        attending.step([(sequence, 4 + n) for n, sequence in enumerate(sequences)])
        decoded = [attending.step([(s, 1) for s in sequences], key=key) for _ in range(20)]
        for number, sequence in enumerate(sequences):
            found = torch.cat([rows[number] for rows in decoded])
            want = attending.exact(sequence)[4 + number : 24 + number]
            assert float((found - want).abs().max()) <= 1e-5 * float(want.abs().max())
    for one, other in zip(
        (recorded.cache.keys_LNKDP, recorded.cache.values_LNKPD),
        (plain.cache.keys_LNKDP, plain.cache.values_LNKPD),
        strict=True,
    ):
        assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))


def test_recorded_attention_takes_more_threads_when_histories_are_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MIN_SHARED_SEEN", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    asked: list[int] = []
    call = Region.call

    def noted(
        region: Region, record: Sequence[int], *, num_threads: int, counter: int | None = None
    ) -> Call:
        asked.append(num_threads)
        return call(region, record, num_threads=num_threads, counter=counter)

    monkeypatch.setattr(Region, "call", noted)
    attending = Attending(CompiledArithmetic(), shape_of())
    sequence = attending.sequence(30, seed=1)
    attending.step([(sequence, 1)])  # makes room
    asked.clear()
    for _ in range(25):
        attending.step([(sequence, 1)], key="key")
    assert asked == [1, 2]  # one recording for few positions, one for many


def test_what_the_loops_would_misread_is_refused() -> None:
    arithmetic, x_TI = CompiledArithmetic(), torch.zeros(2, WIDTH)
    weight, y_TO = torch.zeros(WIDTH, 3).T, torch.zeros(2, 3)
    with pytest.raises(AssertionError):
        arithmetic.multiply(x_TI, whole(2), [Product(weight, y_TO, None)])
    product = Product(weight.contiguous(), y_TO, None)
    with pytest.raises(AssertionError):
        arithmetic.multiply(x_TI.bfloat16(), whole(2), [product])
    with pytest.raises(AssertionError):
        arithmetic.prepare([], empty_cache(shape_of(), dtype=torch.bfloat16))


@pytest.mark.skipif(not can_round(), reason="no units for bfloat16")
def test_rounded_arithmetic_rounds_rows_over_bfloat16_words_only() -> None:
    x_TI, rows = random(5, WIDTH, seed=0), whole(5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = random(9, WIDTH, seed=1, dtype=dtype)
        found = []
        for rounded in (False, True):
            y_TO = torch.empty(5, 9)
            CompiledArithmetic(rounded=rounded).multiply(x_TI, rows, [Product(weight, y_TO, None)])
            found.append(y_TO)
        assert torch.equal(*found) is (dtype is not torch.bfloat16)
        torch.testing.assert_close(*found, rtol=0.02, atol=0.05)
