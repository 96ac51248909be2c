"""An adapter served as a delta answers as the base with the adapter merged into it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from linker_core.errors import BadCheckpointError, LinkerError
from linker_core.residency.adapter import write_adapter
from linker_core.residency.loader import load_tensors
from linker_core.residency.stored import Stored, StoredResidual, StoredTensor
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_data import check_data, check_donor
from linker_core.sharing.plan import Policy
from linker_core.sharing.planner import plan_donor
from linker_core.sharing.rungs import Residual, Rung
from linker_core.weights.checkpoint import Checkpoint
from tests.lora import EMBED, FILE, HEAD, make_adapter, merge
from tests.tiny import make_checkpoint

DONOR = "d" * 64
CPU = torch.device("cpu")


def convert(folder: Path, base: Path, adapter: Path) -> Path:
    with Checkpoint.open(base) as donor:
        write_adapter(adapter, donor, folder / "delta", donor_fingerprint=DONOR)
    return folder / "delta"


def loaded(path: Path, base: Path) -> dict[str, Stored]:
    """Loads a delta over its donor, as the engine does."""

    def exhausted(*given: Any) -> dict[str, Stored]:
        arriving = load_tensors(*given, device=CPU)
        while True:
            try:
                next(arriving)
            except StopIteration as end:
                tensors: dict[str, Stored] = end.value
                return tensors

    with Checkpoint.open(base) as donor, DeltaFile.open(path) as delta:
        check_donor(delta, donor)
        check_data(delta)
        own = exhausted(donor, plan_donor(donor, fingerprint=DONOR), {})
        return exhausted(delta, delta.plan, own)


def whole(entry: Stored) -> torch.Tensor:
    if isinstance(entry, StoredResidual):
        return entry.base.tensor.float() + entry.delta()
    assert isinstance(entry, StoredTensor)
    return entry.tensor.float()


def logits(path: Path, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """A forward pass in float32, of other weights if they are given."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if weights is not None:
        model.load_state_dict(dict(weights), strict=True)
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(40).view(1, 40)).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_adapter_answers_as_the_merged_model(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    """Factors rounded to bfloat16 leave logits within the rounding's share of what they change."""
    base = make_checkpoint(tmp_path / "base", architecture=architecture, tie=False)
    targets = ("proj", EMBED, HEAD)
    adapter = make_adapter(tmp_path / "adapter", base, targets=targets, dtype=dtype)
    merged = merge(tmp_path / "merged", base, adapter, 1.5)
    entries = loaded(convert(tmp_path, base, adapter), base)
    expected, before = logits(merged), logits(base)
    found = logits(merged, {name: whole(entry) for name, entry in entries.items()})
    moved = (expected - before).norm()
    assert (found - expected).norm() < 0.01 * moved
    assert moved > 0.1 * expected.norm()


def test_bfloat16_factors_and_a_power_of_two_are_kept_bit_by_bit(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False, dtype="float32")
    adapter = make_adapter(tmp_path / "adapter", base, dtype=torch.bfloat16, lora_alpha=8)
    entries = loaded(convert(tmp_path, base, adapter), base)
    for name, expected in load_file(
        merge(tmp_path / "merged", base, adapter, 2.0) / "model.safetensors"
    ).items():
        torch.testing.assert_close(whole(entries[name]), expected, rtol=1e-6, atol=1e-6)


def test_odd_scaling_rounds_one_bfloat16_factor_alone(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False)
    adapter = make_adapter(tmp_path / "adapter", base, dtype=torch.bfloat16, lora_alpha=7)
    state = load_file(adapter / FILE)
    for name, entry in loaded(convert(tmp_path, base, adapter), base).items():
        if not isinstance(entry, StoredResidual):
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = state[f"{stem}A.weight"], state[f"{stem}B.weight"]
        assert entry.down is not None
        assert entry.up is not None
        down, up = entry.down.decoded(), entry.up.decoded()
        assert torch.equal(down, a.float()) != torch.equal(up, b.T.float())


def test_scaling_goes_where_it_rounds_less(tmp_path: Path) -> None:
    """One factor holds numbers that a scaling of 3 leaves exact, the other does not."""
    base = make_checkpoint(tmp_path / "base", tie=False)
    adapter = make_adapter(tmp_path / "adapter", base, dtype=torch.bfloat16, lora_alpha=12)
    state = load_file(adapter / FILE)
    for name, factor in state.items():
        if "lora_B" in name:
            state[name] = factor.sign() / 4
    save_file(state, adapter / FILE)
    entries = loaded(convert(tmp_path, base, adapter), base)
    for name, expected in load_file(
        merge(tmp_path / "merged", base, adapter, 3.0) / "model.safetensors"
    ).items():
        torch.testing.assert_close(whole(entries[name]), expected, rtol=1e-6, atol=1e-6)


def test_rank_above_the_smaller_side_is_reduced_to_it(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False, dtype="float32")
    adapter = make_adapter(tmp_path / "adapter", base, rank=60, targets=("k_proj", "down_proj"))
    path = convert(tmp_path, base, adapter)
    with DeltaFile.open(path) as delta:
        ranks = {r.rank for r in delta.plan.rungs.values() if isinstance(r, Residual)}
        assert ranks == {24, 48}
    entries = loaded(path, base)
    merged = load_file(merge(tmp_path / "merged", base, adapter, 0.1) / "model.safetensors")
    before = load_file(base / "model.safetensors")
    for name, entry in entries.items():
        if isinstance(entry, StoredResidual):
            gained = merged[name] - before[name]
            assert (whole(entry) - merged[name]).norm() < 0.005 * gained.norm()


def test_plan_says_what_an_adapter_is(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, rank=2, targets=("q_proj",))
    with DeltaFile.open(convert(tmp_path, base, adapter)) as delta, Checkpoint.open(base) as donor:
        plan = delta.plan
        assert plan.policy is Policy.ADAPTER
        assert plan.donor_fingerprint == DONOR
        coded = {name for name, rung in plan.rungs.items() if rung is not Rung.ALIAS}
        assert coded == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
        assert plan.unique_bytes == delta.nbytes == 2 * 2 * (48 + 48) * 2
        assert plan.logical_bytes == plan.checkpoint_bytes == donor.nbytes
        assert (plan.price, plan.mean_cos, plan.mean_epsilon, plan.region) == (None,) * 4
        assert plan.blocks.residual == 2


def test_fingerprint_is_of_content_scaling_and_base(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False)
    found = set()
    for number, change in enumerate(
        ({}, {"lora_alpha": 7}, {"seed": 8}, {"targets": ("q_proj",)}, {"use_rslora": True})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        adapter = make_adapter(folder / "adapter", base, **change)  # type: ignore[arg-type]
        with DeltaFile.open(convert(folder, base, adapter)) as delta:
            found.add(delta.plan.variant_fingerprint)
    folder = tmp_path / "other-base"
    folder.mkdir()
    with Checkpoint.open(base) as donor:
        write_adapter(tmp_path / "0/adapter", donor, folder / "delta", donor_fingerprint="e" * 64)
    with DeltaFile.open(folder / "delta") as delta:
        found.add(delta.plan.variant_fingerprint)
    assert len(found) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_factors_that_are_not_finite_are_refused_and_nothing_stays(
    tmp_path: Path, value: float
) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False)
    adapter = make_adapter(tmp_path / "adapter", base)
    state = load_file(adapter / FILE)
    state["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][1, 2] = value
    save_file(state, adapter / FILE)
    with pytest.raises(BadCheckpointError, match=r"layers\.1\.self_attn\.q_proj.*not finite"):
        convert(tmp_path, base, adapter)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_same_adapter_again_is_left_as_it_is_and_another_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False)
    adapter = make_adapter(tmp_path / "adapter", base)
    before = convert(tmp_path, base, adapter).stat().st_ino
    assert convert(tmp_path, base, adapter).stat().st_ino == before
    other = make_adapter(tmp_path / "other", base, seed=8)
    with pytest.raises(LinkerError, match="another plan"):
        convert(tmp_path, base, other)


def test_adapter_that_is_written_to_meanwhile_is_noticed(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False)
    adapter = make_adapter(tmp_path / "adapter", base)

    def touch(_done: int, _total: int) -> None:
        os.utime(adapter / FILE)

    with Checkpoint.open(base) as donor, pytest.raises(BadCheckpointError, match="changed while"):
        write_adapter(adapter, donor, tmp_path / "delta", donor_fingerprint=DONOR, progress=touch)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("own", ["nothing", "file", "config", "tokenizer"])
def test_texts_are_the_adapters_where_it_has_its_own(tmp_path: Path, own: str) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False)
    adapter = make_adapter(tmp_path / "adapter", base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    if own == "file":
        (adapter / "chat_template.jinja").write_text("mine")
    if own in ("config", "tokenizer"):
        (adapter / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
        mine = {"chat_template": "mine"} if own == "config" else {}
        (adapter / "tokenizer_config.json").write_text(json.dumps(settings | mine))
    (adapter / "README.md").write_text("not copied")
    path = convert(tmp_path, base, adapter)
    if own in ("file", "config"):
        assert (path / "chat_template.jinja").exists() == (own == "file")
        assert "mine" in (
            (path / "chat_template.jinja").read_text()
            if own == "file"
            else (path / "tokenizer_config.json").read_text()
        )
    else:
        assert (path / "chat_template.jinja").read_bytes() == (
            base / "chat_template.jinja"
        ).read_bytes()
    assert not (path / "README.md").exists()
    assert (path / "config.json").read_bytes() == (base / "config.json").read_bytes()
