"""Variants written as deltas, every tensor on a rung that is drawn."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from linker_core.residency.delta_writer import write_delta
from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.stored import StoredResidual, StoredTensor
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_donor, plan_rungs
from linker_core.sharing.rungs import AnyRung, Residual, Rung, parse_rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME

DONOR, VARIANT = "a" * 64, "b" * 64  # fingerprints
RESIDUALS = (
    "signs:32", "signs:128", "int2:64", "int3:32", "int4:64", "int4:256",
    "rank3:4", "rank4:8", "rank2:16",
    "rank4:8+signs:64", "rank2:16+int2:32", "rank1:4+int3:128", "rank5:8+int4:32",
)  # fmt: skip


def random_rungs(
    chance: random.Random, donor: Checkpoint, variant: Checkpoint
) -> dict[str, AnyRung]:
    """Any rung that a tensor can have; residuals are likely."""
    rungs: dict[str, AnyRung] = {}
    for name, info in variant.tensors.items():
        plain = [Rung.OWN]
        if donor.tensors[name].shape == info.shape:
            plain.append(Rung.ALIAS)
        if name in (EMBED_NAME, LM_HEAD_NAME) and donor.tensors[name].dtype == info.dtype:
            plain.append(Rung.ROWS)
        drawn: list[AnyRung] = [chance.choice(plain)]
        if len(info.shape) == 2:
            drawn += [parse_rung(rung) for rung in chance.sample(RESIDUALS, 3)]
        rungs[name] = chance.choice(drawn)
    return rungs


def donor_plan(path: Path) -> SharePlan:
    """The plan of the donor that deltas are written to."""
    with Checkpoint.open(path) as checkpoint:
        return plan_donor(checkpoint, fingerprint=DONOR)


def write_random_delta(
    chance: random.Random, donor_path: Path, variant_path: Path, target: Path
) -> SharePlan:
    """Writes a variant's delta on rungs that are drawn; returns its plan."""
    with Checkpoint.open(donor_path) as donor, Checkpoint.open(variant_path) as variant:
        rungs = random_rungs(chance, donor, variant)
    return write_planned(donor_path, variant_path, target, rungs)


def write_planned(
    donor_path: Path,
    variant_path: Path,
    target: Path,
    rungs: Mapping[str, AnyRung],
    *,
    fingerprint: str = VARIANT,
) -> SharePlan:
    """Writes a variant's delta on given rungs, those of matrices; the rest is the variant's own.

    Returns its plan.
    """
    with Checkpoint.open(donor_path) as donor, Checkpoint.open(variant_path) as variant:
        plan = plan_rungs(
            scan(donor, variant),
            donor,
            variant,
            dict.fromkeys(variant.tensors, Rung.OWN) | dict(rungs),
            policy=Policy.BUDGET,
            fingerprints=Fingerprints(DONOR, fingerprint),
        )
        write_delta(plan, donor, variant, target)
    return plan


def encoded(base: StoredTensor, tensor: torch.Tensor, name: str, rung: Residual) -> StoredResidual:
    """What a delta file holds of a matrix, which one thread encodes: more would sum otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return DeltaEncoder(base, tensor, seed=zlib.crc32(name.encode())).encode(rung)
    finally:
        torch.set_num_threads(threads)


def matrices(path: Path) -> list[str]:
    """The names of a checkpoint's matrices, embedding and head among them."""
    with Checkpoint.open(path) as checkpoint:
        return [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2]
