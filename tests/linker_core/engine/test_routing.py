"""Rows find their own storage, grouped once, and nothing is kept of what has left."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linker_core.engine.linear import LinearProduct
from linker_core.engine.routing import RoutedLinear
from linker_core.engine.rows import RowMap, StepContext, put_rows, take_rows
from linker_core.residency.ledger import StoredTensor
from tests.linker_core.engine.families import CPU, build_family, stored_tensors
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant


class CountingProduct(LinearProduct):
    """Counts rows of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __call__(
        self, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        self.rows.append(len(x_TI))
        return super().__call__(x_TI, weight_OI, bias_O)


def stored(*shape: int, seed: int) -> StoredTensor:
    generator = torch.Generator().manual_seed(seed)
    return StoredTensor(tensor=torch.randn(*shape, generator=generator).bfloat16())


def test_row_map_groups_are_runs_where_rows_are_together() -> None:
    rows = RowMap([4, 4, 0, 7, 7, 0], device=CPU)
    assert rows.distinct == (4, 0, 7)
    run, scattered = rows.groups((0, 1, 0))
    assert isinstance(run, torch.Tensor)
    assert run.tolist() == [0, 1, 3, 4]
    assert isinstance(scattered, torch.Tensor)
    assert rows.groups((0, 1, 2))[0] == slice(0, 2)
    assert rows.groups((0, 0, 0)) == (slice(0, 6),)


def test_row_map_works_out_a_partition_once() -> None:
    rows = RowMap([0, 1, 0], device=CPU)
    assert rows.groups((0, 1)) is rows.groups((0, 1))


def test_take_and_put_rows_are_inverse_for_runs_and_indices() -> None:
    x_T = torch.arange(12.0).view(6, 2)
    for group in (slice(1, 4), torch.tensor([0, 2, 5])):
        out_T = torch.zeros_like(x_T)
        put_rows(out_T, group, take_rows(x_T, group))
        assert torch.equal(take_rows(out_T, group), take_rows(x_T, group))
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
    product = CountingProduct()
    context = StepContext(linear=product)
    leaf = RoutedLinear("m", nn.Linear(4, 3, device="meta"), context)
    by_weight = [stored(3, 4, seed=n) for n in range(3)]
    by_bias = [stored(3, seed=10 + n) for n in range(2)]
    for slot, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        leaf.bind(slot, {"m.weight": by_weight[weight], "m.bias": by_bias[bias]})
    slots = [0, 1, 2, 0, 1, 2]
    context.body = RowMap(slots, device=CPU)
    x_TI = torch.randn(6, 4, generator=torch.Generator().manual_seed(99))
    got_TO = leaf(x_TI.unsqueeze(0))[0]
    for row, slot in enumerate(slots):
        weight_OI = by_weight[weights[slot]].tensor.float()
        bias_O = by_bias[biases[slot]].tensor.float()
        want_O = F.linear(x_TI[row], weight_OI, bias_O)
        torch.testing.assert_close(got_TO[row], want_O, rtol=1e-5, atol=1e-5)
    assert sorted(product.rows) == products


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
