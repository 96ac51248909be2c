"""Both arithmetics against float64, operation by operation."""

from __future__ import annotations

import math

import pytest
import torch

from linker_core.engine.arithmetic import Addend, Arithmetic, ByRow, Norm, Product
from linker_core.engine.rows import RowGroup
from linker_core.engine.torch_arithmetic import TorchArithmetic
from tests.linker_core.engine.attending import Attended, Attending, shape_of
from tests.linker_core.engine.families import ARITHMETICS
from tests.linker_core.engine.residuals import assert_added, residual

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RESIDUALS = (
    *("signs:32", "int2:64", "int3:128", "int4:256"),
    *("rank3:4", "rank5:8", "rank7:16", "rank2:16+int4:64"),
)
KEPT = 7.0
SHAPES = {
    "grouped": shape_of(),
    "alone": shape_of(num_heads=3, num_kv_heads=3, head_dim=24),
    "all": shape_of(num_heads=6, num_kv_heads=1, head_dim=8),
    "window": shape_of(window=5),
    "softcap": shape_of(softcap=2.0, window=9),
}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def group(rows: list[int]) -> RowGroup:
    together = rows == list(range(rows[0], rows[-1] + 1))
    return RowGroup(torch.tensor(rows), slice(rows[0], rows[-1] + 1) if together else None)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())


def biases(kind: str, num_out: int) -> ByRow | None:
    if kind == "none":
        return None
    if kind == "same":
        return ByRow([random(num_out, seed=1, dtype=torch.bfloat16)], None)
    if kind == "other":
        return ByRow([random(num_out, seed=1)], None)
    kinds = DTYPES if kind == "mixed" else (torch.bfloat16,) * 3
    tensors = [random(num_out, seed=n, dtype=dtype) for n, dtype in enumerate(kinds)]
    return ByRow(tensors, torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0]))


@pytest.mark.parametrize("rows", [[2], [1, 2, 3], [0, 3, 8], list(range(9))], ids=str)
@pytest.mark.parametrize("bias_kind", ["none", "same", "other", "by row", "mixed"])
@pytest.mark.parametrize("kind", ARITHMETICS)
def test_products_of_some_rows_leave_the_others(
    kind: type[Arithmetic], bias_kind: str, rows: list[int]
) -> None:
    x_TI = random(9, 40, seed=0)
    both = torch.full((9, 75 + 4), KEPT)
    products = [
        Product(random(50, 40, seed=3, dtype=torch.bfloat16), both[:, :50], biases(bias_kind, 50)),
        Product(random(25, 40, seed=4, dtype=torch.float16), both[:, 50:75], biases("none", 25)),
    ]
    kind().multiply(x_TI, group(rows), products)
    others = [row for row in range(9) if row not in rows]
    assert (both[others] == KEPT).all()
    assert (both[:, 75:] == KEPT).all()
    for weight_OI, y_TO, bias in products:
        want_nO = x_TI[rows].double() @ weight_OI.double().T
        if bias is not None:
            labels = [0] * 9 if bias.labels_T is None else bias.labels_T.tolist()
            want_nO += torch.stack([bias.tensors[labels[row]].double() for row in rows])
        assert_near(y_TO[rows], want_nO)


@pytest.mark.parametrize("text", RESIDUALS)
@pytest.mark.parametrize("kind", ARITHMETICS)
def test_residuals_are_added_to_their_rows_alone(kind: type[Arithmetic], text: str) -> None:
    x_TI = random(9, 200, seed=0)
    wide, narrow = random(9, 75 + 4, seed=1), random(9, 5_000, seed=2)
    before = [wide.clone(), wide.clone(), narrow.clone()]
    addends = [
        Addend(residual(text, 75, 200, seed=3), group([0, 3, 8]), wide[:, 2:77]),
        Addend(residual(text, 75, 200, seed=4), group([1, 2]), wide[:, 2:77]),
        Addend(residual("int2:32", 5_000, 200), group(list(range(9))), narrow),
    ]
    kind().add_residuals(x_TI, addends)
    views = [before[0][:, 2:77], before[1][:, 2:77], before[2]]
    for addend, kept in zip(addends[:2], views[:2], strict=True):
        rows = addend.rows.indices_n
        kept_elsewhere = addend.y_TO.clone()
        kept_elsewhere[rows] = kept[rows]
        assert_added(x_TI, [addend], [kept_elsewhere])
    assert_added(x_TI, addends[2:], views[2:])
    untouched = [4, 5, 6, 7]
    assert torch.equal(wide[untouched], before[0][untouched])
    assert torch.equal(wide[:, :2], before[0][:, :2])
    assert torch.equal(wide[:, 77:], before[0][:, 77:])


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("kind", ARITHMETICS)
def test_norms_of_every_type_share_a_batch_in_place(kind: type[Arithmetic], plus_one: bool) -> None:
    tensors = [random(12, seed=n, dtype=dtype) for n, dtype in enumerate(DTYPES)]
    labels = [0, 2, 1, 1, 0, 2]
    buffer = random(6, 40, seed=9) * 3
    x_TX, before = buffer[:, 2:38], buffer.clone()
    weights = ByRow(tensors, torch.tensor(labels))
    kind().normalize(x_TX, weights, Norm(1e-5, plus_one=plus_one), x_TX)
    parts = before[:, 2:38].double().reshape(6, 3, 12)
    factor = torch.stack([tensors[label].double() for label in labels]).unsqueeze(1) + plus_one
    want = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + 1e-5) * factor
    assert_near(x_TX, want.flatten(1))
    assert torch.equal(buffer[:, :2], before[:, :2])
    assert torch.equal(buffer[:, 38:], before[:, 38:])


@pytest.mark.parametrize("kind", ARITHMETICS)
def test_norm_of_one_weight_goes_where_it_is_told(kind: type[Arithmetic]) -> None:
    x_TH, weight = random(5, 24, seed=1), random(24, seed=2, dtype=torch.bfloat16)
    before, out_TH = x_TH.clone(), torch.empty(5, 24)
    kind().normalize(x_TH, ByRow([weight], None), Norm(1e-6, plus_one=False), out_TH)
    x = x_TH.double()
    want = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert_near(out_TH, want)
    assert torch.equal(x_TH, before)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("kind", ARITHMETICS)
def test_gate_is_the_formula(kind: type[Arithmetic], activation: str) -> None:
    both = random(4, 2 * 37, seed=0) * 3
    gate_TI, up_TI = both[:, :37], both[:, 37:]
    x, up = gate_TI.double(), up_TI.double()
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    want = {
        "silu": x * torch.sigmoid(x),
        "gelu": x * torch.special.ndtr(x),
        "gelu_pytorch_tanh": 0.5 * x * (1 + torch.tanh(inner)),
        "relu": x.clamp_min(0),
    }[activation] * up
    kind().gate(gate_TI, up_TI, activation)
    assert_near(gate_TI, want)
    assert torch.equal(up_TI.double(), up)


@pytest.mark.parametrize("kind", ARITHMETICS)
def test_add_is_the_sum_in_place(kind: type[Arithmetic]) -> None:
    x_TH, y_TH = random(5, 29, seed=0), random(5, 29, seed=1)
    want_TH = x_TH + y_TH
    kind().add(x_TH, y_TH)
    assert torch.equal(x_TH, want_TH)


@pytest.mark.parametrize("kind", ARITHMETICS)
def test_buffer_has_the_type_and_size_that_were_asked_for(kind: type[Arithmetic]) -> None:
    arithmetic = kind()
    for num_rows in (3, 9, 2):
        found = arithmetic.buffer("name", num_rows, 5, torch.empty(0, dtype=torch.bfloat16))
        assert (found.shape, found.dtype) == ((num_rows, 5), torch.bfloat16)
        assert found.stride(1) == 1


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("kind", ARITHMETICS)
def test_attention_in_chunks_over_scattered_pages_is_the_definition(
    kind: type[Arithmetic], name: str
) -> None:
    attending = Attending(kind(), SHAPES[name])
    sequences = [attending.sequence(num_tokens, seed=num_tokens) for num_tokens in (23, 7, 31)]
    found: list[list[torch.Tensor]] = [[], [], []]
    # Growing in turns scatters the pages; prefills and decodes are side by side.
    for lengths in ([5, 1, 9], [1, 1, 0], [0, 4, 13], [16, 0, 1], [1, 1, 8]):
        numbers = [number for number, length in enumerate(lengths) if length]
        for number, rows_nX in zip(
            numbers, attending.step([(sequences[n], lengths[n]) for n in numbers]), strict=True
        ):
            found[number].append(rows_nX)
    for sequence, parts in zip(sequences, found, strict=True):
        assert_near(torch.cat(parts), attending.exact(sequence))
    assert attending.cache.keys_LNKDP[0].isnan().all()  # the other layer's
    written = 23 + 7 + 31
    features = attending.shape.num_kv_heads * attending.shape.head_dim
    for tensor in (attending.cache.keys_LNKDP, attending.cache.values_LNKPD):
        assert int((~tensor[1].isnan()).sum()) == written * features


def test_plain_attention_in_bfloat16_is_near_the_definition() -> None:
    """As on CUDA: activations and pages in bfloat16, scores in float32."""
    attending = Attending(TorchArithmetic(), SHAPES["softcap"], dtype=torch.bfloat16)
    sequence: Attended = attending.sequence(20, seed=1)
    parts = [*attending.step([(sequence, 12)]), *attending.step([(sequence, 8)])]
    found = torch.cat(parts)
    assert found.dtype is torch.bfloat16
    want = attending.exact(sequence)
    assert float((found.double() - want).abs().max()) <= 0.03 * float(want.abs().max())
