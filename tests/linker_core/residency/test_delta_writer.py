"""A variant written as a delta and read back: what the encoder gives, and nothing by halves."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linker_core.residency.delta_writer import write_delta
from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.ledger import StoredTensor
from linker_core.sharing.delta import DeltaFile, open_weights
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_rungs
from linker_core.sharing.rungs import AnyRung, Residual, Rung, parse_rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant

RUNGS = (
    "alias", "own", "rank4:8", "int4:64", "rank4:8+signs:64", "rank3:16", "int3:32", "signs:128",
    "rank5:4+int2:64",
)  # fmt: skip
EMBED = "model.embed_tokens.weight"


def mixed_plan(donor: Checkpoint, variant: Checkpoint) -> SharePlan:
    """A plan with every rung in it."""
    rungs: dict[str, AnyRung] = {}
    for number, (name, info) in enumerate(variant.tensors.items()):
        matrix = len(info.shape) == 2
        rungs[name] = parse_rung(RUNGS[number % len(RUNGS)]) if matrix else Rung.OWN
    rungs[EMBED] = Rung.ROWS
    if "lm_head.weight" in rungs:
        rungs["lm_head.weight"] = parse_rung("rank3:8")
    return plan_rungs(
        scan(donor, variant),
        donor,
        variant,
        rungs,
        policy=Policy.BUDGET,
        fingerprints=Fingerprints("a" * 64, "b" * 64),
    )


def write_mixed(folder: Path, *, dtype: str = "bfloat16") -> tuple[SharePlan, Path]:
    """Writes donor, variant and a delta of all rungs into a folder."""
    donor_path = make_checkpoint(folder / "donor", tie=False, dtype=dtype)
    variant_path = make_variant(
        folder / "variant", donor_path, scale=0.05, added_tokens=["<new>", "<newer>"]
    )
    with Checkpoint.open(donor_path) as donor, Checkpoint.open(variant_path) as variant:
        plan = mixed_plan(donor, variant)
        write_delta(plan, donor, variant, folder / "delta")
    return plan, folder / "delta"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_delta_read_back_holds_what_the_encoder_gives(tmp_path: Path, dtype: str) -> None:
    plan, path = write_mixed(tmp_path, dtype=dtype)
    base = load_file(tmp_path / "donor" / "model.safetensors")
    whole = load_file(tmp_path / "variant" / "model.safetensors")
    with DeltaFile.open(path) as delta:
        assert delta.plan == plan
        assert delta.nbytes == plan.unique_bytes
        assert delta.eos_token_ids == {2}
        stored = load_file(path / "delta.safetensors")  # any reader of safetensors will do
        assert set(stored) == set(delta.tensors)
        for name, rung in plan.rungs.items():
            if rung is Rung.OWN:
                assert torch.equal(stored.pop(name), whole[name])
            elif rung is Rung.ROWS:
                rebuilt = torch.cat([base[name], base[name][:2]])
                rebuilt[stored.pop(f"{name}.positions")] = stored.pop(f"{name}.rows")
                assert torch.equal(rebuilt, whole[name])
            elif isinstance(rung, Residual):
                seed = zlib.crc32(name.encode())
                donor_tensor = StoredTensor(tensor=base[name])
                again = DeltaEncoder(donor_tensor, whole[name], seed=seed).encode(rung)
                assert torch.equal(stored.pop(f"{name}.extra"), again.extra)
                for part, matrix in (
                    ("dense", again.dense),
                    ("down", again.down),
                    ("up", again.up),
                ):
                    if matrix is not None:
                        assert torch.equal(stored.pop(f"{name}.{part}.codes"), matrix.codes_RB)
                        if matrix.bits < 16:
                            scales = stored.pop(f"{name}.{part}.scales")
                            assert torch.equal(scales, matrix.scales_RG)
        assert not stored


def test_open_weights_tells_a_delta_from_a_checkpoint(tmp_path: Path) -> None:
    _, path = write_mixed(tmp_path)
    with open_weights(path) as delta, open_weights(tmp_path / "variant") as variant:
        assert isinstance(delta, DeltaFile)
        assert isinstance(variant, Checkpoint)
        assert delta.config == variant.config
