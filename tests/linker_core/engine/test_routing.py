"""Rows find their own storage, grouped once, and nothing is kept of what has left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linker_core.engine.arithmetic import Addend, Arithmetic, Norm, Product
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.routing import RoutedLinear, RoutedNorm, multiply
from linker_core.engine.rows import RowGroup, RowMap, StepContext
from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.stored import StoredResidual, StoredTensor
from linker_core.sharing.rungs import Residual, parse_rung
from tests.linker_core.engine.families import (
    ARITHMETICS,
    CPU,
    build_family,
    dense,
    stored_tensors,
)
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant


class CountingArithmetic(CompiledArithmetic):
    """Counts rows of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.calls = 0

    def multiply(self, x_TI: torch.Tensor, rows: RowGroup, products: Sequence[Product]) -> None:
        self.calls += 1
        self.rows += [len(rows.indices_n)] * len(products)
        super().multiply(x_TI, rows, products)


def stored(*shape: int, seed: int) -> StoredTensor:
    generator = torch.Generator().manual_seed(seed)
    return StoredTensor(tensor=torch.randn(*shape, generator=generator).bfloat16())


def test_row_map_groups_are_runs_where_rows_are_together() -> None:
    rows = RowMap([4, 4, 0, 7, 7, 0], device=CPU)
    assert rows.distinct == (4, 0, 7)
    scattered, together = rows.groups((0, 1, 0))
    assert (scattered.indices_n.tolist(), scattered.run) == ([0, 1, 3, 4], None)
    assert (together.indices_n.tolist(), together.run) == ([2, 5], None)
    assert rows.groups((0, 1, 2))[0].run == slice(0, 2)
    (every,) = rows.groups((0, 0, 0))
    assert (every.indices_n.tolist(), every.run) == ([0, 1, 2, 3, 4, 5], slice(0, 6))


def test_row_map_labels_every_row_with_its_group() -> None:
    rows = RowMap([4, 4, 0, 7, 7, 0], device=CPU)
    assert rows.labels((0, 1, 0)).tolist() == [0, 0, 1, 0, 0, 1]


def test_row_map_works_out_a_partition_once() -> None:
    rows = RowMap([0, 1, 0], device=CPU)
    assert rows.groups((0, 1)) is rows.groups((0, 1))
    assert rows.labels((0, 1)) is rows.labels((0, 1))


def test_take_and_put_are_inverse_for_runs_and_indices() -> None:
    x_T = torch.arange(12.0).view(6, 2)
    for run, numbers in ((slice(1, 4), [1, 2, 3]), (None, [0, 2, 5])):
        group = RowGroup(torch.tensor(numbers), run)
        out_T = torch.zeros_like(x_T)
        group.put(out_T, group.take(x_T))
        assert torch.equal(group.take(out_T), group.take(x_T))
        assert int((out_T != 0).any(dim=1).sum()) == 3


@pytest.mark.parametrize(
    ("weights", "biases", "products"),
    [
        ((0, 0, 0), (0, 0, 0), [6]),
        ((0, 0, 0), (0, 1, 1), [6]),  # the bias alone is own: still one product
        ((0, 1, 0), (0, 0, 0), [2, 4]),
        ((0, 1, 0), (0, 1, 0), [2, 4]),
        ((0, 1, 2), (0, 1, 0), [2, 2, 2]),
    ],
)
def test_routed_linear_groups_weights_and_biases_by_their_own_storage(
    weights: tuple[int, ...], biases: tuple[int, ...], products: list[int]
) -> None:
    counting = CountingArithmetic()
    context = StepContext(counting)
    leaf = RoutedLinear("m", nn.Linear(4, 3, device="meta"), context)
    by_weight = [stored(3, 4, seed=n) for n in range(3)]
    by_bias = [stored(3, seed=10 + n) for n in range(2)]
    for slot, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        leaf.bind(slot, {"m.weight": by_weight[weight], "m.bias": by_bias[bias]})
    slots = [0, 1, 2, 0, 1, 2]
    context.body = RowMap(slots, device=CPU)
    x_TI = torch.randn(6, 4, generator=torch.Generator().manual_seed(99))
    got_TO = leaf(x_TI, "out")
    for row, slot in enumerate(slots):
        weight_OI = by_weight[weights[slot]].tensor.float()
        bias_O = by_bias[biases[slot]].tensor.float()
        want_O = F.linear(x_TI[row], weight_OI, bias_O)
        torch.testing.assert_close(got_TO[row], want_O, rtol=1e-5, atol=1e-5)
    assert sorted(counting.rows) == products


def test_leaves_that_group_alike_are_computed_together_and_shown_each() -> None:
    counting = CountingArithmetic()
    context = StepContext(counting)
    leaves = [
        RoutedLinear(name, nn.Linear(4, num_out, bias=False, device="meta"), context)
        for name, num_out in (("a", 3), ("b", 5), ("c", 2))
    ]
    for slot in range(2):
        for number, leaf in enumerate(leaves):
            own = slot if leaf.leaf_name == "c" else 0
            weight = stored(leaf.num_out, 4, seed=10 * number + own)
            leaf.bind(slot, {f"{leaf.leaf_name}.weight": weight})
    # The same storage for both slots of `a` and `b`, one each of `c`.
    for leaf in leaves[:2]:
        weight = leaf.stored[0]["weight"]
        leaf.unbind(1)
        leaf.bind(1, {f"{leaf.leaf_name}.weight": weight})
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    context.watch = lambda name, x_TI, y_TO: seen.append((name, x_TI, y_TO))
    context.body = RowMap([0, 1, 0], device=CPU)
    x_TI = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    outs = [torch.empty(3, leaf.num_out) for leaf in leaves]
    multiply(leaves, x_TI, outs, context)
    assert counting.calls == 1 + 2
    assert [name for name, _, _ in seen] == ["a.weight", "b.weight", "c.weight"]
    for (_, seen_TI, seen_TO), leaf, y_TO in zip(seen, leaves, outs, strict=True):
        assert seen_TI is x_TI
        assert seen_TO is y_TO
        for row, slot in enumerate((0, 1, 0)):
            want_O = x_TI[row] @ leaf.stored[slot]["weight"].tensor.float().T
            torch.testing.assert_close(y_TO[row], want_O)


def coded_variant(base: StoredTensor, rung: str, *, seed: int) -> StoredResidual:
    """A matrix near `base`, held as its delta."""
    generator = torch.Generator().manual_seed(seed)
    delta_OI = 0.1 * torch.randn(base.tensor.shape, generator=generator)
    parsed = parse_rung(rung)
    assert isinstance(parsed, Residual)
    return DeltaEncoder(base, base.tensor.float() + delta_OI).encode(parsed)


@pytest.mark.parametrize("kind", ARITHMETICS)
def test_deltas_to_one_weight_are_added_to_one_product(kind: type[Arithmetic]) -> None:
    counted: list[int] = []
    added: list[Sequence[Addend]] = []

    class Counting(kind):  # type: ignore[misc, valid-type]
        def multiply(self, x_TI: torch.Tensor, rows: RowGroup, products: Sequence[Product]) -> None:
            counted.append(len(rows.indices_n))
            super().multiply(x_TI, rows, products)

        def add_residuals(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
            added.append(addends)
            super().add_residuals(x_TI, addends)

    context = StepContext(Counting())
    leaves = [
        RoutedLinear(name, nn.Linear(40, num_out, device="meta"), context)
        for name, num_out in (("a", 24), ("b", 16))
    ]
    rungs = [None, "int4:32", "rank4:8", "rank2:16+signs:32", None]
    for leaf in leaves:
        name = leaf.leaf_name
        weight, bias = stored(leaf.num_out, 40, seed=1), stored(leaf.num_out, seed=2)
        for slot, rung in enumerate(rungs):
            entry = coded_variant(weight, rung, seed=slot) if rung else weight
            leaf.bind(slot, {f"{name}.weight": entry, f"{name}.bias": bias})
    kinds = [tuple(leaf.kind(slot) for leaf in leaves) for slot in range(5)]
    assert kinds[0] == kinds[4]
    assert len(set(kinds)) == 4
    slots = [3, 0, 1, 2, 1, 4, 3]
    context.body = RowMap(slots, device=CPU)
    x_TI = torch.randn(7, 40, generator=torch.Generator().manual_seed(3))
    seen: list[torch.Tensor] = []
    context.watch = lambda _name, _x, y_TO: seen.append(y_TO.clone())
    outs = [torch.empty(7, leaf.num_out) for leaf in leaves]
    multiply(leaves, x_TI, outs, context)
    assert counted == [7]
    assert [len(addends) for addends in added] == [3 * len(leaves)]
    for leaf, y_TO, shown_TO in zip(leaves, outs, seen, strict=True):
        assert torch.equal(shown_TO, y_TO)
        for row, slot in enumerate(slots):
            weight_OI = dense(leaf.kind(slot)[-1] if rungs[slot] else leaf.kind(slot)[0])
            bias_O = leaf.stored[slot]["bias"].tensor.float()
            want_O = F.linear(x_TI[row], weight_OI.float(), bias_O)
            torch.testing.assert_close(y_TO[row], want_O, rtol=1e-4, atol=1e-4)


def test_unbound_deltas_are_forgotten() -> None:
    leaf = RoutedLinear(
        "m", nn.Linear(40, 8, bias=False, device="meta"), StepContext(CountingArithmetic())
    )
    weight = stored(8, 40, seed=1)
    delta = coded_variant(weight, "int2:32", seed=2)
    leaf.bind(0, {"m.weight": weight})
    leaf.bind(1, {"m.weight": delta})
    gone = weakref.ref(delta.tensors[0])
    del delta
    leaf.unbind(1)
    gc.collect()
    assert gone() is None
    assert leaf.addends(RowMap([0], device=CPU), torch.empty(1, 8)) == []


@pytest.mark.parametrize("kind", ARITHMETICS)
@pytest.mark.parametrize("plus_one", [False, True])
def test_routed_norm_gives_every_row_its_own_weight(kind: type[Arithmetic], plus_one: bool) -> None:
    norm = Norm(1e-6, plus_one=plus_one)
    leaf = RoutedNorm("m", nn.RMSNorm(6, device="meta"), StepContext(kind()), norm)
    weights = [stored(6, seed=1), stored(6, seed=2)]
    for slot, number in enumerate((0, 1, 0)):
        leaf.bind(slot, {"m.weight": weights[number]})
    x_TH = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    for slots in ([2, 1, 0, 1, 2], [0, 2, 2, 0, 0]):
        leaf.context.body = RowMap(slots, device=CPU)
        got_TH = leaf(x_TH)
        for row, slot in enumerate(slots):
            factor = weights[slot % 2].tensor.float() + plus_one
            want = F.rms_norm(x_TH[row], (6,), factor, eps=1e-6)
            torch.testing.assert_close(got_TH[row], want)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unbind_drops_every_reference_to_the_variants_own_tensors(
    tmp_path: Path, architecture: str, by_rows: bool
) -> None:
    base = make_checkpoint(tmp_path / "base", architecture=architecture)
    path = make_variant(tmp_path / "variant", base, scale=0.3)
    family = build_family(base)
    own = stored_tensors(
        path,
        donor=family.stored[0],
        aliased=lambda name: "layers.0" in name,
        by_rows=lambda name: by_rows and "embed" in name,
    )
    slot = family.add(own)
    refs = {
        (name, number): weakref.ref(tensor)
        for name, entry in own.items()
        if entry is not family.stored[0][name]
        for number, tensor in enumerate(entry.tensors)
    }
    del own
    family.stored.pop()
    gc.collect()
    assert all(ref() is not None for ref in refs.values())
    family.runner.unbind(slot)
    gc.collect()
    assert [name for name, ref in refs.items() if ref() is not None] == []
