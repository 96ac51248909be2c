"""What loading a model will take of the device, from plans alone. Moves nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import Rung
from linker_core.weights.architecture import DTYPE_BYTES, ModelConfig
from linker_core.weights.shapes import expected_tensors

Rungs = Mapping[str, object]  # tensor -> its rung, or its name


def missing_base_bytes(plan: SharePlan, base: ModelConfig, resident: Iterable[Rungs]) -> int:
    """Returns what a plan needs of its base that no resident model of the family has there.

    Args:
        plan: The model's.
        base: The shape of the checkpoint that the family shares.
        resident: The rungs of the family's resident models, none of which is the base itself.
    """
    there = {name for rungs in resident for name in _of_base(rungs)}
    missing = _of_base(plan.rungs) - there
    return sum(
        math.prod(shape) * DTYPE_BYTES[base.dtype]
        for name, shape in expected_tensors(base).items()
        if name in missing
    )


def _of_base(rungs: Rungs) -> set[str]:
    """Returns the tensors of which the base's is read: all but a model's own."""
    return {name for name, rung in rungs.items() if str(rung) != Rung.OWN.value}
