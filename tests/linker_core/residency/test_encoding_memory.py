"""What making a delta announces against what it holds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from linker_core.residency import delta_writer, encoding_memory
from linker_core.residency.encoding_memory import at_once_bytes, encoding_bytes, tensor_bytes
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.rungs import AnyRung, Rung, parse_rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME
from tests.linker_core.residency.deltas import write_planned
from tests.tiny import make_checkpoint, make_variant

WIDE, TALL = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of matrices of 256 x 2048, and their delta."""
    root = tmp_path_factory.mktemp("pair")
    donor_path = make_checkpoint(root / "donor", hidden=256, intermediate=2048, layers=1)
    variant_path = make_variant(
        root / "variant",
        donor_path,
        scale={WIDE: 0.05, TALL: 0.05},
        added_tokens=["<new>"],
        rows={EMBED_NAME: [3, 500]},
    )
    with Checkpoint.open(donor_path) as donor, Checkpoint.open(variant_path) as variant:
        assert donor.tensors.keys() == variant.tensors.keys()
        rungs: dict[str, AnyRung] = dict.fromkeys(variant.tensors, Rung.ALIAS)
        rungs[NORM] = Rung.OWN
    rungs |= {EMBED_NAME: Rung.ROWS}
    coded = {WIDE: parse_rung("rank64:4+int3:64"), TALL: parse_rung("int4:32")}
    write_planned(donor_path, variant_path, root / "delta", rungs | coded)
    return root


def peak_bytes(recording: profile) -> int:
    """The most that was allocated at once while a profile was taken."""
    now = peak = 0
    assert recording.profiler is not None
    assert recording.profiler.kineto_results is not None
    for event in recording.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("name", [WIDE, TALL, EMBED_NAME])
@pytest.mark.parametrize(
    "text",
    ["signs:64", "int4:32", "rank8:8", "rank200:16", "rank100:8+int2:128", "rank256:4+int3:64"],
)
def test_encoding_a_tensor_holds_what_is_announced(folder: Path, name: str, text: str) -> None:
    rung = parse_rung(text)
    with (
        Checkpoint.open(folder / "donor") as donor,
        Checkpoint.open(folder / "variant") as variant,
        DeltaFile.open(folder / "delta") as delta,
    ):
        needs = tensor_bytes(rung, variant.tensors[name], donor.tensors[name])
        source = delta_writer._Source(name, rung, 0, needs, [])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
            delta_writer._encoded(source, delta.plan, donor, variant)
    peak = peak_bytes(recording)
    assert peak <= needs < 6 * peak


def test_tensors_in_the_making_stay_within_the_bound(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_memory, "_AT_ONCE_BYTES", 1)
    lock, now, most = threading.Lock(), 0, 0
    encoded = delta_writer._encoded

    def counted(source: Any, *given: Any) -> Any:
        nonlocal now, most
        with lock:
            now += source.needs
            most = max(most, now)
        stored = encoded(source, *given)
        with lock:
            now -= source.needs
        return stored

    monkeypatch.setattr(delta_writer, "_encoded", counted)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with (
            Checkpoint.open(folder / "donor") as donor,
            Checkpoint.open(folder / "variant") as variant,
            DeltaFile.open(folder / "delta") as delta,
        ):
            delta_writer.write_delta(delta.plan, donor, variant, tmp_path / "again")
            sides = (donor.tensors, variant.tensors)
            limit = at_once_bytes(delta.plan, *sides)
            assert limit < encoding_bytes(delta.plan, *sides)
    finally:
        torch.set_num_threads(threads)
    assert 0 < most <= limit
    with DeltaFile.open(folder / "delta") as once, DeltaFile.open(tmp_path / "again") as again:
        assert once.fingerprint == again.fingerprint
