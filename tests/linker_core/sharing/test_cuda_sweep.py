"""The device's sums against the kernel's, here on torch's own CPU device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linker_core.errors import BadCheckpointError
from linker_core.pace import Pace
from linker_core.sharing import pieces, scan
from linker_core.sharing.cuda_sweep import sweep_on
from linker_core.sharing.report import ScanReport
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant


def both(
    donor: Path, variant: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ScanReport, ScanReport]:
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 1000)
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        plain = scan.scan(a, b)
        monkeypatch.setattr(scan, "choose_sweep", lambda _device: sweep_on("cpu"))
        return plain, scan.scan(a, b, pace=Pace())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_device_sweep_finds_what_the_kernel_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    donor = make_checkpoint(tmp_path / "d", dtype=dtype, tie=False)
    scale = {"lm_head.weight": 0.1, "model.layers.0.mlp.up_proj.weight": 0.02}
    variant = make_variant(tmp_path / "v", donor, scale=scale, added_tokens=("<a>",))
    state = load_file(variant / "model.safetensors")
    state["model.embed_tokens.weight"][3, 5] += 1
    save_file(state, variant / "model.safetensors")
    plain, on_device = both(donor, variant, monkeypatch)
    assert on_device.identical_rows == plain.identical_rows
    assert plain.identical_rows["model.embed_tokens.weight"] == 511
    for block, expected in zip(on_device.blocks, plain.blocks, strict=True):
        for name, sums in block.params.items():
            close = dataclasses.asdict(expected.params[name])
            assert dataclasses.asdict(sums) == pytest.approx(close, rel=1e-12), name


def test_device_sweep_compares_other_types_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_checkpoint(tmp_path / "v")
    state = load_file(variant / "model.safetensors")
    save_file({name: t.float() for name, t in state.items()}, variant / "model.safetensors")
    plain, on_device = both(donor, variant, monkeypatch)
    assert json.dumps(on_device.to_json()["blocks"]) == json.dumps(plain.to_json()["blocks"])


@pytest.mark.parametrize("poisoned", ["d", "v"])
def test_device_sweep_refuses_nonfinite_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: str
) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    file = tmp_path / poisoned / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"].view(-1)[7] = torch.inf
    save_file(state, file)
    monkeypatch.setattr(scan, "choose_sweep", lambda _device: sweep_on("cpu"))
    with (
        Checkpoint.open(donor) as a,
        Checkpoint.open(variant) as b,
        pytest.raises(BadCheckpointError, match=r"up_proj.* \(1 seen\)"),
    ):
        scan.scan(a, b)
