"""The loops over compressed deltas: against float64, row by row, recorded, on several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import llvmlite.binding as llvm
import pytest
import torch

from linker_core.engine.arithmetic import Addend, Code, Product
from linker_core.engine.cpu import arithmetic as arithmetic_module
from linker_core.engine.cpu import residual_calls
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.cpu.coded_product_code import emit_coded_product
from linker_core.engine.cpu.coded_steps import PairSteps
from linker_core.engine.cpu.decoding import Lookup
from linker_core.engine.cpu.expand_code import emit_expand
from linker_core.engine.cpu.kernels import can_round
from linker_core.engine.cpu.regions import Region
from linker_core.engine.rows import RowGroup
from linker_core.residency.coding import CodedMatrix
from linker_core.residency.stored import StoredResidual
from tests.linker_core.engine.cpu.compiled import compiled
from tests.linker_core.engine.cpu.products import before_an_unreadable_page
from tests.linker_core.engine.residuals import assert_added, residual

CODED = [f"{kind}:{group}" for kind in ("signs", "int2", "int3", "int4") for group in (32, 64, 256)]
FACTORS = ["rank1:4", "rank5:8", "rank7:16", "rank70:4", "rank19:8", "rank3:16"]
SUMS = ["rank4:8+signs:64", "rank9:4+int4:128", "rank2:16+int3:32"]
SHAPES = [(1, 1), (49, 130), (130, 49), (577, 17), (33, 896), (96, 256)]  # O, I
MARK = 7.0
FEATURES = llvm.get_host_cpu_features()
PAIRS = "pairs"  # of bfloat16, where runs are multiplied in them
WAYS = [
    pytest.param(way, marks=pytest.mark.skipif(not available, reason="no such vectors"))
    for way, available in (
        (PAIRS, can_round()),
        (Lookup.AVX512, FEATURES.get("avx512f", False)),
        (Lookup.AVX2, FEATURES.get("avx2", False)),
        (Lookup.MEMORY, True),
    )
]


@cache
def product_region(code: Code, rounded: bool, way: str) -> Region:
    if way == PAIRS:
        steps = PairSteps(code.bits, code.group, rounded=rounded) if code.group else None
        emit = partial(emit_coded_product, code=code, lookup=Lookup.AVX512, steps=steps)
    else:
        emit = partial(emit_coded_product, code=code, lookup=Lookup(way))
    return Region(compiled(emit), "coded_product")


@cache
def expand_region(code: Code, way: str) -> Region:
    lookup = Lookup.AVX512 if way == PAIRS else Lookup(way)
    return Region(compiled(partial(emit_expand, code=code, lookup=lookup)), "expand")


@pytest.fixture
def computed_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has products computed in a way that this CPU would not choose."""

    def choose(way: str) -> None:
        product, expand = (partial(region, way=way) for region in (product_region, expand_region))
        monkeypatch.setattr(residual_calls, "coded_product_region", product)
        monkeypatch.setattr(residual_calls, "expand_region", expand)

    return choose


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Shares all work among so many threads, however little it is."""
    monkeypatch.setattr(arithmetic_module, "_MIN_SHARED_PRODUCT", 1)
    return lambda number: monkeypatch.setattr(torch, "get_num_threads", lambda: number)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group(rows: Sequence[int]) -> RowGroup:
    together = list(rows) == list(range(rows[0], rows[-1] + 1))
    return RowGroup(torch.tensor(rows), slice(rows[0], rows[-1] + 1) if together else None)


def added(
    x_TI: torch.Tensor,
    residuals: Sequence[StoredResidual],
    rows: Sequence[Sequence[int]],
    arithmetic: CompiledArithmetic | None = None,
) -> list[torch.Tensor]:
    """What each residual adds to zeros [T, O], in one call; checks that all is in its place."""
    outs = [one.num_rows for one in residuals]
    buffer = torch.full((len(x_TI), sum(outs) + len(outs)), MARK)
    ys = []
    for number, num_out in enumerate(outs):
        first = sum(outs[:number]) + number
        ys.append(buffer[:, first : first + num_out].zero_())
    addends = [Addend(r, group(n), y) for r, n, y in zip(residuals, rows, ys, strict=True)]
    (arithmetic or CompiledArithmetic()).add_residuals(x_TI, addends)
    assert_added(x_TI, addends, [torch.zeros_like(y_TO) for y_TO in ys])
    between = [sum(outs[: number + 1]) + number for number in range(len(outs))]
    assert (buffer[:, between] == MARK).all()
    return ys


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", [*CODED, *FACTORS, *SUMS])
def test_residuals_of_any_shape_equal_float64(
    computed_by: Callable[[str], None], text: str, way: str
) -> None:
    computed_by(way)
    for seed, (num_out, width) in enumerate(SHAPES):
        x_TI = random(15, width, seed=seed)
        residuals = [residual(text, num_out, width, seed=9 * seed + n) for n in range(4)]
        added(x_TI, residuals, [[3], [0, 5, 14], [1, 2], list(range(15))])


@pytest.mark.parametrize("text", ["int4:64", "int3:32", "signs:128", "rank5:8", "rank66:4+int2:64"])
def test_a_rows_bits_depend_on_the_row_alone(text: str) -> None:
    x_TI = random(17, 300, seed=0)
    delta = residual(text, 115, 300)
    other = residual(text, 50, 300, seed=7)
    want_TO = torch.cat([added(x_TI[row : row + 1], [delta], [[0]])[0] for row in range(17)])
    for rows in ([2, 3], [0, 4, 9], list(range(6)), list(range(1, 14)), list(range(17))):
        found_TO, _ = added(x_TI, [delta, other], [rows, [5, 11]])
        assert torch.equal(found_TO[rows], want_TO[rows])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    (turned_TO,) = added(x_TI[order].contiguous(), [delta], [list(range(17))])
    assert torch.equal(turned_TO, want_TO[order])


@pytest.mark.parametrize("text", ["int4:64", "rank5:8", "rank8:4+signs:32"])
def test_threads_change_no_bit(threads: Callable[[int], None], text: str) -> None:
    x_TI = random(9, 300, seed=0)
    residuals = [residual(text, 1030, 300, seed=n) for n in range(3)]
    rows = [[0, 4], [1, 2, 3], [5, 6, 7, 8]]
    threads(1)
    alone = added(x_TI, residuals, rows)
    for number in (2, 3, 5):
        threads(number)
        for one, other in zip(alone, added(x_TI, residuals, rows), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("text", ["int3:64", "int4:64", "rank3:8", "rank3:16", "rank3:4+int2:32"])
def test_nothing_is_read_behind_codes_and_scales(text: str) -> None:
    for num_out, width in SHAPES:
        delta = residual(text, num_out, width)
        at_the_end = replace(
            delta,
            dense=_before_the_end(delta.dense),
            down=_before_the_end(delta.down),
            up=_before_the_end(delta.up),
        )
        added(random(7, width, seed=1), [at_the_end], [list(range(7))])


def _before_the_end(matrix: CodedMatrix | None) -> CodedMatrix | None:
    if matrix is None:
        return None
    codes_RB, scales_RG = (
        before_an_unreadable_page(part) if part.numel() else part for part in matrix.tensors
    )
    return replace(matrix, codes_RB=codes_RB, scales_RG=scales_RG)


def test_rows_of_nobody_and_what_was_there_before_do_not_matter() -> None:
    arithmetic = CompiledArithmetic()
    wide = residual("rank6:8+int4:64", 40, 1000)
    broken_TI = torch.full((8, 1000), torch.nan)
    y_TO = torch.zeros(8, 40)
    arithmetic.add_residuals(broken_TI, [Addend(wide, group(list(range(8))), y_TO)])
    assert y_TO.isnan().all()
    x_TI = random(8, 300, seed=1)
    x_TI[[0, 7]] = torch.nan
    addends = [residual(text, 40, 300) for text in ("int3:32", "rank4:4+int4:64")]
    for y_TO in added(x_TI, addends, [[2, 3], [1, 6]], arithmetic):
        assert not y_TO.isnan().any()


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    x_TI = random(9, 200, seed=0)
    delta = residual("rank4:8+int4:64", 75, 200)
    (want_TO,) = added(x_TI, [delta], [list(range(9))])
    x_TI[4] = torch.inf
    y_TO = torch.zeros(9, 75)
    CompiledArithmetic().add_residuals(x_TI, [Addend(delta, group(list(range(9))), y_TO)])
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(y_TO[others], want_TO[others])
    assert not y_TO[4].isfinite().any()


class Leaf:
    """A product and what two variants add to it, over buffers."""

    def __init__(self, text: str) -> None:
        self.arithmetic = CompiledArithmetic()
        self.weight_OI = random(75, 130, seed=1).bfloat16()
        self.residuals = [residual(text, 75, 130, seed=n) for n in (2, 3)]
        self.num_bodies = 0

    def compute(self, x_TI: torch.Tensor, key: str | None) -> torch.Tensor:
        """Returns what the leaf makes of x, run under a key."""
        stream = self.arithmetic.buffer("x", len(x_TI), 130, x_TI).copy_(x_TI)
        y_TO = self.arithmetic.buffer("y", len(x_TI), 75, x_TI)

        def body() -> None:
            self.num_bodies += 1
            rows = group(list(range(len(x_TI))))
            self.arithmetic.multiply(stream, rows, [Product(self.weight_OI, y_TO, None)])
            groups = [group([0, 2]), group([1, 3])]
            addends = [Addend(r, g, y_TO) for r, g in zip(self.residuals, groups, strict=True)]
            self.arithmetic.add_residuals(stream, addends)

        self.arithmetic.run(key, body)
        return y_TO.clone()


@pytest.mark.parametrize("text", ["int4:64", "rank5:8", "rank7:4+signs:32"])
def test_recorded_residuals_are_replayed_over_new_rows(text: str) -> None:
    leaf, plain = Leaf(text), Leaf(text)
    leaf.compute(random(4, 130, seed=9), None)  # makes room
    for seed in range(4):
        x_TI = random(4, 130, seed=seed)
        assert torch.equal(leaf.compute(x_TI, "key"), plain.compute(x_TI, None))
        if seed == 1:  # larger rooms for somebody else leave what was recorded as it is
            larger = residual("rank80:8", 300, 2000)
            rows = group(list(range(9)))
            addend = Addend(larger, rows, torch.zeros(9, 300))
            leaf.arithmetic.add_residuals(random(9, 2000, seed=1), [addend])
    assert (leaf.num_bodies, plain.num_bodies) == (2, 4)


@pytest.mark.skipif(not can_round(), reason="no units for bfloat16")
@pytest.mark.parametrize("text", ["int4:64", "int3:32", "int2:128", "signs:256"])
def test_rounded_arithmetic_rounds_rows_to_bfloat16(text: str) -> None:
    x_TI, rows = random(5, 300, seed=0), group(list(range(5)))
    delta = residual(text, 60, 300)
    found = []
    for rounded, value in ((True, x_TI), (False, x_TI.bfloat16().float())):
        y_TO = torch.zeros(5, 60)
        addend = Addend(delta, rows, y_TO)
        CompiledArithmetic(rounded=rounded).add_residuals(value, [addend])
        found.append(y_TO)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def test_what_the_loops_would_misread_is_refused() -> None:
    delta, rows = residual("int4:64", 20, 40), group([0, 1])
    arithmetic = CompiledArithmetic()
    for x_TI, y_TO in (
        (torch.zeros(2, 40, dtype=torch.bfloat16), torch.zeros(2, 20)),
        (torch.zeros(2, 40), torch.zeros(2, 20, dtype=torch.bfloat16)),
        (torch.zeros(2, 41), torch.zeros(2, 20)),
        (torch.zeros(2, 40), torch.zeros(2, 21)),
    ):
        with pytest.raises(AssertionError):
            arithmetic.add_residuals(x_TI, [Addend(delta, rows, y_TO)])
