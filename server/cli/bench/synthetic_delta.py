"""The delta of one made-up checkpoint to another, on one rung everywhere, written once."""

from __future__ import annotations

from pathlib import Path

from linker_core.residency.delta_writer import write_delta
from linker_core.sharing.plan import Fingerprints, Policy
from linker_core.sharing.planner import plan_rungs
from linker_core.sharing.rungs import AnyRung, Residual, Rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint


def write_delta_once(donor: Path, variant: Path, rung: Residual) -> Path:
    """Returns the folder of a delta whose matrices are all on a rung; vectors are the variant's.

    It lies beside the variant, and is left as it is where it is there.
    """
    target = variant.with_name(f"{variant.name}-{rung}".replace(":", "-"))
    if target.exists():
        return target
    with Checkpoint.open(donor) as base, Checkpoint.open(variant) as checkpoint:
        rungs: dict[str, AnyRung] = {
            name: rung if len(tensor.shape) == 2 else Rung.OWN
            for name, tensor in checkpoint.tensors.items()
        }
        plan = plan_rungs(
            scan(base, checkpoint),
            base,
            checkpoint,
            rungs,
            policy=Policy.DELTA,
            fingerprints=Fingerprints(fingerprint(base), fingerprint(checkpoint)),
        )
        write_delta(plan, base, checkpoint, target)
    return target
