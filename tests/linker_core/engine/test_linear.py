"""The tiled product equals the plain one, with memory that stays small."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from linker_core.engine.linear import LinearProduct


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_widens_stored_words_exactly(dtype: torch.dtype, rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(rows, 24, generator=generator)
    weight_OI = torch.randn(101, 24, generator=generator).to(dtype)
    bias_O = torch.randn(101, generator=generator).to(dtype) if bias else None
    want = F.linear(x_TI, weight_OI.float(), None if bias_O is None else bias_O.float())
    # 7 output rows a tile, which does not divide 101.
    got = LinearProduct(scratch_bytes=7 * 24 * 4)(x_TI, weight_OI, bias_O)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous()


def test_linear_scratch_is_reused_and_holds_at_least_one_row() -> None:
    product = LinearProduct(scratch_bytes=16)
    for width in (8, 64, 8):
        x_TI, weight_OI = torch.ones(1, width), torch.ones(5, width, dtype=torch.bfloat16)
        assert product(x_TI, weight_OI, None).tolist() == [[width] * 5]
    scratch = product._scratch
    assert scratch is not None
    assert scratch.numel() == 64
