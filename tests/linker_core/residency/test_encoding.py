"""A delta in each compressed form: its bytes, and how near it comes."""

from __future__ import annotations

import pytest
import torch

from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.ledger import StoredTensor
from linker_core.sharing.rungs import Residual, parse_rung, residual_bytes

# What the best quantisers of a normal variable leave of its square (Max 1960, table 1).
NORMAL_ERRORS = {"signs": 0.3634, "int2": 0.1175, "int3": 0.03454, "int4": 0.009497}


def residual(text: str) -> Residual:
    rung = parse_rung(text)
    assert isinstance(rung, Residual)
    return rung


@pytest.mark.parametrize("codes", NORMAL_ERRORS)
def test_encoder_normal_delta_comes_as_near_as_its_codes_can(codes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base_OI = torch.randn(96, 512, generator=generator)
    variant_OI = base_OI + 0.01 * torch.randn(96, 512, generator=generator)
    encoder = DeltaEncoder(StoredTensor(tensor=base_OI), variant_OI)
    stored = encoder.encode(residual(f"{codes}:64"))
    delta_OI = variant_OI - base_OI
    error = float((stored.delta() - delta_OI).square().sum() / delta_OI.square().sum())
    assert 0.65 * NORMAL_ERRORS[codes] < error < NORMAL_ERRORS[codes]
    assert stored.nbytes == residual_bytes(residual(f"{codes}:64"), 96, 512)
