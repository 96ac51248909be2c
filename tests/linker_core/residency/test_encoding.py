"""A delta in each compressed form: its bytes, how near it comes, and where it is exact."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linker_core.errors import BadCheckpointError
from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.stored import StoredResidual, StoredTensor
from linker_core.sharing.rungs import ENCODING, Residual, parse_rung, residual_bytes

GOLDEN = "746a68697387ec177aa4fcdf329132620142c8e969857377fa883453ab0c9b4a"
# What the best quantisers of a normal variable leave of its square (Max 1960, table 1).
NORMAL_ERRORS = {"signs": 0.3634, "int2": 0.1175, "int3": 0.03454, "int4": 0.009497}
ANY_RUNG = (
    "signs:32", "int2:64", "int3:128", "int4:256", "rank1:4", "rank3:8", "rank40:16", "rank40:4",
    "rank2:4+signs:64", "rank3:8+int2:32", "rank20:16+int4:64",
)  # fmt: skip


def residual(text: str) -> Residual:
    rung = parse_rung(text)
    assert isinstance(rung, Residual)
    return rung


def random_matrix(rows: int, width: int, *, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def encode(text: str, base_OI: torch.Tensor, variant_OI: torch.Tensor) -> StoredResidual:
    return DeltaEncoder(StoredTensor(tensor=base_OI), variant_OI).encode(residual(text))


def relative_error(stored: StoredResidual, delta_OI: torch.Tensor) -> float:
    return float((stored.delta() - delta_OI).square().sum() / delta_OI.square().sum())


def assert_same(a: StoredResidual, b: StoredResidual) -> None:
    for one, other in zip(a.tensors, b.tensors, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("codes", NORMAL_ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normal_delta_comes_as_near_as_its_codes_can(codes: str, dtype: torch.dtype) -> None:
    base_OI = random_matrix(96, 512).to(dtype)
    variant_OI = (base_OI.float() + random_matrix(96, 512, scale=0.3, seed=1)).to(dtype)
    delta_OI = variant_OI.float() - base_OI.float()
    # A group's scale is fitted to its 64 or 256 values, so it leaves less than the table says, the
    # smaller the group the less.
    few, many = (
        relative_error(encode(f"{codes}:{group}", base_OI, variant_OI), delta_OI)
        for group in (64, 256)
    )
    assert 0.65 * NORMAL_ERRORS[codes] < few < many < 1.01 * NORMAL_ERRORS[codes]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 300),
    text=st.sampled_from(ANY_RUNG),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    extra=st.integers(-3, 3),
)
def test_any_shape_takes_the_bytes_of_its_rung(
    rows: int, width: int, text: str, dtype: torch.dtype, extra: int
) -> None:
    base_OI = random_matrix(rows, width).to(dtype)
    variant_OI = random_matrix(max(1, rows + extra), width, seed=1).to(dtype)
    stored = encode(text, base_OI, variant_OI)
    both = min(len(base_OI), len(variant_OI))
    assert stored.num_rows == len(variant_OI)
    assert stored.nbytes - stored.extra.nbytes == residual_bytes(residual(text), both, width)
    assert torch.equal(stored.extra, variant_OI[both:])
    assert stored.extra.dtype == dtype
    delta_OI = variant_OI[:both].float() - base_OI[:both].float()
    left = (stored.delta() - delta_OI).square().sum()
    # Nothing is always at hand, so no rung may leave more, but for what its scales are rounded by.
    assert left <= 1.01 * delta_OI.square().sum() + 1e-9


@pytest.mark.parametrize("rank", [1, 5, 16, 23])
def test_delta_of_low_rank_is_kept_to_the_precision_of_its_factors(rank: int) -> None:
    base_OI = random_matrix(80, 60)
    delta_OI = random_matrix(80, rank, seed=1) @ random_matrix(rank, 60, seed=2)
    for bits, bound in ((16, 2**-14), (8, 1e-3), (4, 0.03)):
        stored = encode(f"rank{rank}:{bits}", base_OI, base_OI + delta_OI)
        assert relative_error(stored, delta_OI) < bound, bits


def test_factors_come_as_near_as_singular_vectors() -> None:
    delta_OI = random_matrix(200, 120) * torch.logspace(0, -2, 120)
    values = torch.linalg.svdvals(delta_OI)
    for rank in (4, 16, 40):
        best = float(values[rank:].square().sum() / values.square().sum())
        stored = encode(f"rank{rank}:16", torch.zeros(200, 120), delta_OI)
        assert best <= relative_error(stored, delta_OI) < 1.02 * best + 1e-4


def test_four_bit_factors_mend_what_rounding_left() -> None:
    delta_OI = random_matrix(200, 120) * torch.logspace(0, -2, 120)
    found = {
        rank: relative_error(encode(f"rank{rank}:4", torch.zeros(200, 120), delta_OI), delta_OI)
        for rank in (16, 48, 112)
    }
    # All 120 directions rounded once would leave 0.0095 for each side, 0.019 in all.
    assert found[112] < 0.005 < found[48] < found[16]


def test_delta_of_signs_is_exact() -> None:
    base_OI = torch.zeros(20, 200)
    signs_OI = random_matrix(20, 200).sign()
    sizes_OG = torch.tensor([0.5, 0.25, 2.0, 1.5]).expand(20, 4)  # of groups of 64; exact
    delta_OI = signs_OI * sizes_OG.repeat_interleave(64, dim=1)[:, :200]
    assert torch.equal(encode("signs:64", base_OI, delta_OI).delta(), delta_OI)


def test_codes_take_what_rounded_factors_leave() -> None:
    base_OI = random_matrix(64, 256)
    spread_OI = 3.0 * random_matrix(64, 2, seed=1) @ random_matrix(2, 256, seed=2)
    delta_OI = spread_OI + random_matrix(64, 256, seed=3)
    both = encode("rank2:4+int3:64", base_OI, base_OI + delta_OI)
    alone = encode("rank2:4", base_OI, base_OI + delta_OI)
    left_OI = delta_OI - alone.delta()
    assert both.dense is not None
    rest = (both.dense.decoded() - left_OI).square().sum() / left_OI.square().sum()
    assert rest < NORMAL_ERRORS["int3"]


@pytest.mark.parametrize("text", ANY_RUNG)
def test_encoding_is_the_same_whatever_was_encoded_before(text: str) -> None:
    base_OI, variant_OI = random_matrix(90, 130), random_matrix(90, 130, seed=1)
    encoder = DeltaEncoder(StoredTensor(tensor=base_OI), variant_OI)
    for other in ANY_RUNG:
        encoder.encode(residual(other))
    assert_same(encoder.encode(residual(text)), encode(text, base_OI, variant_OI))


def test_chunks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    base_OI, variant_OI = random_matrix(90, 130), random_matrix(90, 130, seed=1)
    whole = encode("int3:64", base_OI, variant_OI)
    monkeypatch.setattr("linker_core.residency.encoding.CHUNK_WEIGHTS", 7 * 130)
    assert_same(encode("int3:64", base_OI, variant_OI), whole)
    factors = encode("rank8:8", base_OI, variant_OI)
    delta_OI = variant_OI - base_OI
    best = torch.linalg.svdvals(delta_OI)[8:].square().sum() / delta_OI.square().sum()
    assert math.isclose(relative_error(factors, delta_OI), float(best), rel_tol=0.02)


@pytest.mark.parametrize("text", ANY_RUNG)
def test_equal_tensors_have_no_delta(text: str) -> None:
    base_OI = random_matrix(30, 70)
    assert not encode(text, base_OI, base_OI.clone()).delta().any()


@pytest.mark.parametrize("text", ["int4:64", "rank4:8", "rank4:16", "rank2:4+signs:64"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_delta_that_is_not_finite_is_refused(text: str, bad: float) -> None:
    base_OI = random_matrix(30, 70)
    variant_OI = base_OI.clone()
    variant_OI[3, 5] = bad
    with pytest.raises(BadCheckpointError, match="not finite"):
        encode(text, base_OI, variant_OI)


def test_codes_are_those_that_the_number_of_the_encoding_stands_for() -> None:
    """Stored prices and folders are found by it: whoever changes these bytes raises it."""
    delta_OI = torch.tensor([math.sin(n * n) for n in range(4 * 256)]).reshape(4, 256)
    digest = hashlib.sha256()
    for text in ("signs:64", "int2:64", "int3:128", "int4:64"):
        dense = encode(text, torch.zeros(4, 256), delta_OI).dense
        assert dense is not None
        for part in (dense.codes_RB, dense.scales_RG.view(torch.uint8)):
            digest.update(part.numpy().tobytes())
    assert (ENCODING, digest.hexdigest()) == (1, GOLDEN)
