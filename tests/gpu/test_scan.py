"""A scan whose sums are computed on a CUDA device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scan_on_a_device_equals_the_scan_on_the_host(tmp_path: Path, dtype: str) -> None:
    donor = make_checkpoint(tmp_path / "d", dtype=dtype, layers=4, hidden=512, intermediate=4096)
    variant = make_variant(tmp_path / "v", donor, scale={"model.norm.weight": 0.1})
    far = make_variant(tmp_path / "f", donor, scale=0.02)
    for path in (variant, far):
        with Checkpoint.open(donor) as a, Checkpoint.open(path) as b:
            on_device, on_host = scan(a, b, device="cuda"), scan(a, b)
        assert on_device.identical_rows == on_host.identical_rows
        for block, expected in zip(on_device.blocks, on_host.blocks, strict=True):
            for name, sums in block.params.items():
                close = dataclasses.asdict(expected.params[name])
                assert dataclasses.asdict(sums) == pytest.approx(close, rel=1e-9), name
