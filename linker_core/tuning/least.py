"""The least that a variant can hold, known from its scan. Measures nothing, and needs no torch."""

from __future__ import annotations

from linker_core.errors import InvalidRequestError
from linker_core.sharing.plan import tensor_bytes
from linker_core.sharing.planner import count_own_rows, identical_rungs
from linker_core.sharing.report import Region, ScanReport
from linker_core.sharing.rungs import AnyRung, Rung
from linker_core.tuning.offered import offered_to
from linker_core.weights.checkpoint import Checkpoint


def least_bytes(report: ScanReport, donor: Checkpoint, variant: Checkpoint) -> int:
    """Returns the unique bytes of the smallest plan that a tuner would choose.

    Only matrices have cheaper rungs than their own; far from the donor none of them aliases.

    Args:
        report: The pair's scan.
        donor: The donor's checkpoint.
        variant: The variant's.
    """
    base = identical_rungs(report, donor, variant)
    own_rows = count_own_rows(report, variant, base)
    least = 0
    for name, rung in base.items():
        own, lent = variant.tensors[name], donor.tensors.get(name)
        rungs: set[AnyRung] = {rung}
        if rung is not Rung.ALIAS and len(own.shape) == 2:
            rungs |= set(offered_to(own, lent))
            if report.region is Region.OUTSIDE:
                rungs.discard(Rung.ALIAS)
        least += min(
            tensor_bytes(one, own, num_own_rows=own_rows.get(name), donor=lent) for one in rungs
        )
    return least


def beyond_reach(max_bytes: int, least: int) -> InvalidRequestError:
    """Returns what is said of a limit below the least that a variant can hold."""
    return InvalidRequestError(
        f"max_bytes is {max_bytes}, but {least} bytes are the variant's own however much is "
        f"shared. Raise it to {least} or more.",
        param="max_bytes",
    )
