"""The CUDA arithmetic on CPU tensors: plain kernels, and torch's operations replayed for graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from linker_core.engine.arithmetic import Addend, ByRow, Norm, Product
from linker_core.engine.cuda.arithmetic import CudaArithmetic
from linker_core.engine.page_table import PageTable
from linker_core.engine.rows import RowMap
from linker_core.engine.torch_arithmetic import TorchArithmetic
from tests.linker_core.engine.cuda.attended import CASES, Attended, Case, check_attention
from tests.linker_core.engine.cuda.plain_kernels import PlainKernels
from tests.linker_core.engine.cuda.recorded import Noting, Recorder
from tests.linker_core.engine.cuda.streams import (
    MAX_TOKENS,
    Stream,
    check_isolation,
    check_mixed_batches,
    forward,
    mixed_family,
)
from tests.linker_core.engine.families import everything, stored_tensors
from tests.linker_core.engine.residuals import residual
from tests.tiny import ARCHITECTURES, make_variant

CPU = torch.device("cpu")


def plain(capture: Recorder | None = None, *, num_positions: int = MAX_TOKENS) -> CudaArithmetic:
    return CudaArithmetic(PlainKernels(num_positions=num_positions), capture)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_mixed_steps_over_shuffled_pages_equals_the_definition(case: Case) -> None:
    arithmetic = plain(num_positions=160)
    attended = Attended(case, arithmetic, device=CPU, dtype=torch.float32)
    check_attention(attended, tolerance=1e-5)


@pytest.mark.parametrize("slots", [[0, 0, 1, 1, 1], [1, 0, 1, 0, 0]], ids=["runs", "scattered"])
@pytest.mark.parametrize("by_row", [False, True])
def test_multiply_rows_of_a_group_equals_the_plain_path(slots: list[int], by_row: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = RowMap(slots, device=CPU)
    x_TI = torch.randn(5, 8, generator=generator)
    weights = [torch.randn(n, 8, generator=generator) for n in (6, 4)]
    weights[1] = weights[1].bfloat16()
    labels_T = rows.labels((0, 1)) if by_row else None
    results = []
    for arithmetic in (plain(), TorchArithmetic()):
        both = torch.full((5, 10), 7.0)
        for group in rows.groups((0, 1))[:1]:
            products = []
            for weight_OI, y_TO in zip(weights, (both[:, :6], both[:, 6:]), strict=True):
                biases = [torch.full((len(weight_OI),), b).bfloat16() for b in (0.5, 2.0)]
                bias = ByRow(biases if by_row else biases[:1], labels_T)
                products.append(Product(weight_OI, y_TO, bias))
            arithmetic.multiply(x_TI, group, products)
        results.append(both)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    other = rows.groups((0, 1))[1].indices_n
    assert (results[0][other] == 7.0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_gives_each_variants_own_logits(tmp_path: Path, architecture: str) -> None:
    recorder = Recorder()
    check_mixed_batches(*mixed_family(tmp_path, architecture, plain(recorder)))
    assert recorder.num_captures == 1
    assert recorder.num_replays == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_replayed_steps_equal_launched_ones_bit_for_bit(
    tmp_path: Path, architecture: str
) -> None:
    recorder = Recorder()
    launched, _ = mixed_family(tmp_path / "a", architecture, plain())
    replayed, _ = mixed_family(tmp_path / "b", architecture, plain(recorder))
    both = [[Stream(family, n, seed=n) for n in range(5)] for family in (launched, replayed)]
    for lengths in ([3, 9, 1, 4, 2], *[[1] * 5] * 12):
        want_RV, got_RV = (forward(streams, lengths) for streams in both)
        assert torch.equal(want_RV, got_RV)
    assert (recorder.num_captures, recorder.num_replays) == (1, 10)


def test_forward_asks_the_device_for_nothing_before_its_end(tmp_path: Path) -> None:
    family, _ = mixed_family(tmp_path, "gemma2", plain())
    streams = [Stream(family, n, seed=n) for n in range(5)]
    for lengths in ([3, 9, 1, 4, 2], [1] * 5, [1] * 5):
        with Noting() as noting:
            forward(streams, lengths)
        assert noting.calls  # none of which gives the host a number


def test_forward_replays_over_other_sequences_pages_and_positions(tmp_path: Path) -> None:
    recorder = Recorder()
    launched, _ = mixed_family(tmp_path / "a", "qwen2", plain())
    replayed, _ = mixed_family(tmp_path / "b", "qwen2", plain(recorder))
    for family in (launched, replayed):
        forward([Stream(family, 0, seed=9)], [20])  # room for all that follows
    # The same slots every time, served to other sequences that lie elsewhere.
    for turn in range(4):
        if turn:
            for family in (launched, replayed):
                assert family.cache.grow(PageTable(), 4 * turn)
        both = [
            [Stream(family, n, seed=10 * turn + n) for n in (0, 2)]
            for family in (launched, replayed)
        ]
        for lengths in ([3 + turn, 5], [1, 1]):
            want_RV, got_RV = (forward(streams, lengths) for streams in both)
            assert torch.equal(want_RV, got_RV)
    assert (recorder.num_captures, recorder.num_replays) == (1, 2)


def test_forward_slots_with_the_same_blocks_share_a_replay(tmp_path: Path) -> None:
    recorder = Recorder()
    launched, base = mixed_family(tmp_path / "a", "qwen2", plain())
    replayed, _ = mixed_family(tmp_path / "b", "qwen2", plain(recorder))
    variant = make_variant(tmp_path / "v", base, scale=0.2)
    for family in (launched, replayed):
        aliased = {**stored_tensors(variant, donor=family.stored[0], aliased=everything)}
        aliased["model.norm.weight"] = stored_tensors(variant)["model.norm.weight"]
        family.add(aliased)
    for slots in ([0, 1, 2], [0, 5, 2], [4, 5, 2], [1, 1, 2]):
        both = [
            [Stream(family, slot, seed=n) for n, slot in enumerate(slots)]
            for family in (launched, replayed)
        ]
        for lengths in ([2, 3, 4], [1, 1, 1]):
            want_RV, got_RV = (forward(streams, lengths) for streams in both)
            assert torch.equal(want_RV, got_RV)
    assert (recorder.num_captures, recorder.num_replays) == (1, 2)


def test_bound_and_unbound_weights_drop_every_replay(tmp_path: Path) -> None:
    recorder = Recorder()
    arithmetic = plain(recorder)
    family, base = mixed_family(tmp_path, "llama", arithmetic)
    streams = [Stream(family, 0, seed=1), Stream(family, 2, seed=2)]
    for _ in range(3):
        forward(streams, [1, 1])
    assert recorder.num_replays == 1
    variant = make_variant(tmp_path / "late", base, scale=0.2)
    family.runner.bind(9, stored_tensors(variant))
    for _ in range(2):
        forward(streams, [1, 1])
    assert (recorder.num_captures, recorder.num_replays) == (2, 1)
    family.runner.unbind(9)
    forward(streams, [1, 1])
    assert recorder.num_replays == 1


def test_grown_buffers_and_tables_drop_every_replay(tmp_path: Path) -> None:
    recorder = Recorder()
    family, _ = mixed_family(tmp_path, "llama", plain(recorder))
    stream = Stream(family, 0, seed=1)
    for _ in range(3):
        forward([stream], [1])
    assert recorder.num_replays == 1
    forward([Stream(family, 0, seed=2)], [30])
    reference, _ = mixed_family(tmp_path / "again", "llama", plain())
    plain_stream = Stream(reference, 0, seed=1)
    forward([plain_stream], [3])
    for _ in range(3):
        want_RV, got_RV = forward([plain_stream], [1]), forward([stream], [1])
        torch.testing.assert_close(got_RV, want_RV, rtol=1e-5, atol=1e-5)
    assert (recorder.num_captures, recorder.num_replays) == (2, 2)


def test_forward_keeps_what_is_not_finite_to_its_own_sequence(tmp_path: Path) -> None:
    family, _ = mixed_family(tmp_path, "qwen2", plain(Recorder()))
    check_isolation(family)


def test_replayed_residuals_are_added_to_the_rows_of_now() -> None:
    recorder = Recorder()
    arithmetic = plain(recorder)
    deltas = [residual(text, 12, 40) for text in ("int4:32", "rank3:8")]
    x_TI, y_TO = torch.empty(3, 40), torch.empty(3, 12)
    for seed in range(4):
        x_TI.copy_(torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)))
        y_TO.zero_()
        groups = RowMap([0, 1, 0], device=CPU).groups((0, 1))
        addends = [Addend(d, group, y_TO) for d, group in zip(deltas, groups, strict=True)]
        arithmetic.run("key", partial(arithmetic.add_residuals, x_TI, addends))
        for addend in addends:
            rows = addend.rows.indices_n
            want_nO = x_TI[rows] @ addend.residual.delta().T
            torch.testing.assert_close(y_TO[rows], want_nO, rtol=1e-4, atol=1e-4)
    assert (recorder.num_captures, recorder.num_replays) == (1, 2)


def test_capture_keeps_the_row_numbers_that_its_replays_read() -> None:
    arithmetic = CudaArithmetic(PlainKernels(num_positions=1), Unheld())
    numbers = capture_over_scattered_rows(arithmetic)
    gc.collect()
    assert all(number() is not None for number in numbers)
    arithmetic.forget()
    gc.collect()
    assert all(number() is None for number in numbers)


def capture_over_scattered_rows(
    arithmetic: CudaArithmetic,
) -> list[weakref.ReferenceType[torch.Tensor]]:
    """Has a step captured whose row numbers nobody else holds; returns these."""
    rows = RowMap([0, 1, 0], device=CPU)
    (group, other), labels_T = rows.groups((0, 1)), rows.labels((0, 1))
    x_TI, out_TI = torch.ones(3, 4), torch.empty(3, 4)
    weights = ByRow([torch.ones(4), torch.zeros(4)], labels_T)

    def body() -> None:
        arithmetic.multiply(x_TI, group, [Product(torch.eye(4), out_TI, None)])
        arithmetic.add_residuals(x_TI, [Addend(residual("signs:32", 4, 4), other, out_TI)])
        arithmetic.normalize(x_TI, weights, Norm(1e-6, plus_one=False), out_TI)

    for _ in range(2):
        arithmetic.run("key", body)
    return [weakref.ref(tensor) for tensor in (group.indices_n, other.indices_n, labels_T)]


class Unheld:
    """A capture whose replays hold nothing, as a graph's do not."""

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        body()
        return lambda: None

    def forget(self) -> None:
        """Holds nothing."""
