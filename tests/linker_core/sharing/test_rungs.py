"""Rungs as text, and the bytes of each, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linker_core.errors import InvalidRequestError
from linker_core.sharing.rungs import (
    CODE_BITS,
    FACTOR_BITS,
    GROUPS,
    MAX_RANK,
    AnyRung,
    Residual,
    Rung,
    coarse,
    kind_of,
    parse_rung,
    residual_bytes,
)


@st.composite
def residuals(draw: st.DrawFn) -> Residual:
    has_codes = draw(st.booleans())
    has_factors = not has_codes or draw(st.booleans())
    return Residual(
        bits=draw(st.sampled_from(CODE_BITS)) if has_codes else 0,
        group=draw(st.sampled_from(GROUPS)) if has_codes else 0,
        rank=draw(st.integers(1, MAX_RANK)) if has_factors else 0,
        factor_bits=draw(st.sampled_from(FACTOR_BITS)) if has_factors else 0,
    )


@given(residuals() | st.sampled_from(Rung))
def test_rung_is_read_as_it_is_written(rung: AnyRung) -> None:
    assert parse_rung(str(rung)) == rung


@pytest.mark.parametrize(
    "text",
    [
        "", "Alias", "int5:64", "int4:65", "int4", "signs:0", "rank0:8", "rank4:2", "rank4097:8",
        "rank4:8+", "+signs:64", "signs:64+rank4:8", "rank4:8+rank4:8", "int4:64+signs:64",
        "rank4:8+alias", " int4:64", "int4:64\n", "rank٤:8", "rank4:8+signs:64+int2:64",
    ],
)  # fmt: skip
def test_rung_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no rung"):
        parse_rung(text)


@pytest.mark.parametrize(
    ("text", "rows", "width", "nbytes"),
    [
        # 100 of a row's weights take a run of 128 codes, and 2 scales of groups of 64.
        ("signs:64", 3, 100, 3 * (128 // 8 + 2 * 2)),
        ("int3:32", 3, 129, 3 * (256 * 3 // 8 + 5 * 2)),
        ("int4:256", 5, 256, 5 * (128 + 2)),
        # 8-bit rows of 100 and 3 are padded to 112 and 16, and have one scale each.
        ("rank2:8", 3, 100, 2 * (112 + 2) + 2 * (16 + 2)),
        # 4-bit rows of 100 and 3 take a run of 64 bytes each, and 2 scales and 1.
        ("rank2:4", 3, 100, 2 * (64 + 4) + 2 * (64 + 2)),
        ("rank2:16", 3, 100, 2 * 2 * (3 + 100)),
        ("rank1:16+int2:128", 4, 128, 2 * (4 + 128) + 4 * (32 + 2)),
    ],
)
def test_bytes_of_a_residual_are_those_of_its_parts(
    text: str, rows: int, width: int, nbytes: int
) -> None:
    rung = parse_rung(text)
    assert isinstance(rung, Residual)
    assert residual_bytes(rung, rows, width) == nbytes


@pytest.mark.parametrize(
    ("text", "kind", "column"),
    [
        ("alias", "alias", "alias"),
        ("rows", "rows", "rows"),
        ("own", "own", "own"),
        ("signs:32", "signs", "residual"),
        ("rank12:4", "lowrank", "residual"),
        ("rank8:8+int3:128", "lowrank+int3", "residual"),
    ],
)
def test_rungs_are_counted_by_kind(text: str, kind: str, column: str) -> None:
    assert kind_of(parse_rung(text)) == kind
    assert coarse(parse_rung(text)) == column
