"""How far a fine-tune is from its base: BS's two numbers, its regions, and what rounding leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from analysis.record import TensorStudy
from linker_core.sharing.report import Region, region

_SIGNIFICAND_BITS = {"BF16": 8, "F16": 11, "F32": 24}  # the leading one included


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a fine-tune is from its base."""

    cos: float  # as BS Eq. 1: mean over a block's tensors, then over blocks
    epsilon: float  # as BS Eq. 2
    region: Region
    floors: float  # the tensor that moved most, in multiples of what rounding leaves


def distance(studies: Sequence[TensorStudy], number: int) -> Distance:
    """Returns where fine-tune `number` stands, from the tensors looked at alone."""
    blocks: dict[int | None, list[TensorStudy]] = {}
    for study in studies:
        blocks.setdefault(study.layer, []).append(study)
    cos = fmean(fmean(study.base_cosines[number] for study in block) for block in blocks.values())
    epsilon = fmean(fmean(study.epsilons[number] for study in block) for block in blocks.values())
    return Distance(
        cos=cos,
        epsilon=epsilon,
        region=region(cos, epsilon),
        floors=max(
            study.epsilons[number] / rounding_floor((study.dtypes[0], study.dtypes[number + 1]))
            for study in studies
        ),
    )


def rounding_floor(dtypes: Sequence[str]) -> float:
    """Returns the ε that rounding alone leaves in the coarsest of these types.

    With p bits of significand, a weight m·2^e (1 ≤ m < 2) is off by up to half a step, 2^-p·2^e,
    evenly: its mean square is 2^-2p·4^e / 3. Weights spread over several binades have m
    log-uniform, so E[m²] = 3 / (2 ln 2), and ε = |error| / |W| = 2^-p · √(2 ln 2) / 3: 0.0015 in
    bfloat16 (p = 8), 0.00019 in float16, 2·10^-8 in float32.
    """
    bits = min(_SIGNIFICAND_BITS[dtype] for dtype in dtypes)
    return 2.0**-bits * math.sqrt(2.0 * math.log(2.0)) / 3.0
