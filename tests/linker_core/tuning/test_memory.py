"""What a pass announces against what it holds."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from linker_core.residency.loader import read_tensor
from linker_core.sharing.rungs import parse_rung, residual_bytes
from linker_core.tuning import memory, storages
from linker_core.tuning.memory import (
    LOGITS_CHUNK_BYTES,
    activation_bytes,
    answering_bytes,
    tuning_bytes,
)
from linker_core.tuning.offered import offered_rungs
from linker_core.tuning.sensitivity import measure_sensitivities
from linker_core.tuning.storages import Rungs
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import parse_key
from tests.linker_core.tuning.pairs import Pair, make_pair, open_pair, random_text
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant


def section_bytes(checkpoint: Checkpoint, part: str) -> int:
    return sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if part in name)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path, layers=3, tie=False, added_tokens=["<|a|>"])


def weights_held(pair: Pair) -> int:
    """One block and what lies outside the blocks, of each side."""
    sides, layers = (pair.donor, pair.variant), pair.variant.config.num_layers
    return sum(side.nbytes - (layers - 1) * section_bytes(side, "layers.0.") for side in sides)


def announced(pair: Pair, num_tokens: int, num_plans: int) -> int:
    donor, variant = pair.donor.config, pair.variant.config
    return tuning_bytes(donor, variant, num_tokens=num_tokens, num_plans=num_plans, device="cpu")


def test_bytes_are_two_blocks_the_ends_residuals_and_a_state_a_plan(pair: Pair) -> None:
    working = announced(pair, 0, 0) - weights_held(pair)
    assert working >= 2 * LOGITS_CHUNK_BYTES
    a_plan = announced(pair, 0, 3) - announced(pair, 0, 2)
    assert announced(pair, 1000, 3) - announced(pair, 0, 3) == 4 * 1000 * 48 * 4
    held = [info for name, info in pair.variant.tensors.items() if in_one_block_or_none(name)]
    matrices = [info for info in held if len(info.shape) == 2]
    assert sum(info.nbytes for info in matrices) / 8 < a_plan
    dearest = [
        max(
            residual_bytes(rung, *info.shape)
            for rung in offered_rungs(*info.shape, element_bytes=2)
        )
        for info in matrices
    ]
    assert all(size < info.nbytes for size, info in zip(dearest, matrices, strict=True))
    assert a_plan == sum(dearest)


def test_layers_take_no_more_than_one_of_them(tmp_path: Path) -> None:
    few, many = (make_pair(tmp_path / str(layers), layers=layers) for layers in (1, 6))
    assert announced(few, 100, 4) == announced(many, 100, 4)


def in_one_block_or_none(name: str) -> bool:
    key = parse_key(name)
    assert key is not None
    return key.layer in (0, None)


def test_pass_holds_two_blocks_and_the_ends_at_most(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    peak = 0

    def watched(checkpoint: Checkpoint, name: str, *, device: torch.device) -> torch.Tensor:
        nonlocal peak
        tensor = read_tensor(checkpoint, name, device=device)
        alive.append(weakref.ref(tensor))
        peak = max(peak, sum(held.nbytes for ref in alive if (held := ref()) is not None))
        return tensor

    monkeypatch.setattr(storages, "read_tensor", watched)
    coded = dict.fromkeys(pair.aliasing("proj.weight"), parse_rung("int2:128"))
    coded = {name: pair.base[name] if "proj.w" not in name else coded[name] for name in coded}
    plans: list[Rungs] = [pair.aliasing("layers."), pair.aliasing("layers.1."), coded, pair.base]
    pricer = pair.pricer(random_text([20, 20]))
    pricer.price(plans)
    blocks = sum(section_bytes(side, "layers.0.") for side in (pair.donor, pair.variant))
    assert blocks < peak <= weights_held(pair)  # what residuals are made of is read once
    assert all(ref() is None for ref in alive)


def peak_bytes(recording: profile) -> int:
    """The most that was allocated at once while a profile was taken."""
    now = peak = 0
    assert recording.profiler is not None
    assert recording.profiler.kineto_results is not None
    for event in recording.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, now)
    assert peak
    return peak


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_holds_what_is_announced_of_its_rows(tmp_path: Path, architecture: str) -> None:
    pair = make_pair(tmp_path, architecture=architecture, layers=1)
    lengths, num_rows = (256, 256), 512
    walk, reader = pair.walk(lengths), pair.reader()
    ids = [3 + number % 500 for number in range(num_rows)]
    state, stored = walk.embed(reader.storages(None, pair.base), ids), reader.storages(0, pair.base)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        walk.block(0, [stored], [state])
    assert peak_bytes(recording) <= num_rows * activation_bytes(walk.config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_measuring_sensitivities_holds_what_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    donor = make_checkpoint(
        tmp_path / "donor", architecture=architecture, layers=1, hidden=96, intermediate=1536
    )
    make_variant(tmp_path / "variant", donor, scale=0.1)
    pair = open_pair(tmp_path)
    num_tokens = 512
    walk, reader = pair.walk((num_tokens,)), pair.reader()
    ids = [3 + number % 500 for number in range(num_tokens)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        measure_sensitivities(walk, reader, pair.base, ids)
    # What counts here are the rows inside a block; the few logits fit beside them.
    monkeypatch.setattr(memory, "LOGITS_CHUNK_BYTES", 0)
    assert peak_bytes(recording) <= announced(pair, num_tokens, 1)


def test_answering_takes_the_whole_variant_and_its_pages(pair: Pair) -> None:
    config = pair.variant.config
    few, many = (
        answering_bytes(config, max_prompt_tokens=tokens, device="cpu") for tokens in (160, 416)
    )
    assert few > pair.variant.nbytes
    # 16 sequences, 256 more tokens each; keys and values of 2 heads of 12 in three layers, float32.
    assert many - few == 16 * 256 * 2 * 3 * 2 * 12 * 4
