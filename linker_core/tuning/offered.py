"""Which rungs a matrix is offered between the donor's tensor and one of its own."""

from __future__ import annotations

import math
from typing import Final

from linker_core.sharing.rungs import AnyRung, Residual, Rung, parse_rung, residual_bytes
from linker_core.weights.safetensors_header import TensorInfo

# On trained fine-tunes factors in 4 bits beat those in more at equal bytes, codes of 1 to 3 bits
# lose nothing by groups of 128, and factors of rank 32 below codes halve the error for half a bit;
# flatter deltas need codes alone. Finer steps than these come of mixing matrices.
_TEXTS: Final = (
    *("rank4:4", "rank8:4", "rank16:4", "rank24:4", "rank32:4", "rank48:4", "rank64:4"),
    *("rank96:4", "rank128:4"),
    *("signs:128", "rank32:4+signs:128", "int2:128", "rank32:4+int2:128"),
    *("int3:128", "rank32:4+int3:128", "int4:64", "rank32:4+int4:64"),
)


def _parsed(texts: tuple[str, ...]) -> tuple[Residual, ...]:
    rungs = (parse_rung(text) for text in texts)
    return tuple(rung for rung in rungs if isinstance(rung, Residual))


OFFERED: Final = _parsed(_TEXTS)


def offered_to(own: TensorInfo, lent: TensorInfo | None) -> tuple[AnyRung, ...]:
    """Returns the rungs below its own that a tensor which differs from the donor's may take.

    Args:
        own: The variant's.
        lent: The donor's of the same name, or None if it has none.
    """
    if lent is None:
        return ()
    alias = (Rung.ALIAS,) if lent.shape == own.shape else ()
    if not may_lean(own, lent):
        return alias
    rows, width = min(own.shape[0], lent.shape[0]), own.shape[1]
    element_bytes = own.nbytes // math.prod(own.shape)
    return (*alias, *offered_rungs(rows, width, element_bytes=element_bytes))


def may_lean(own: TensorInfo, lent: TensorInfo | None) -> bool:
    """Whether a matrix has a delta to the donor's; either may have more rows."""
    return lent is not None and len(own.shape) == 2 and lent.shape[1:] == own.shape[1:]


def offered_rungs(rows: int, width: int, *, element_bytes: int) -> tuple[Residual, ...]:
    """Returns the residual rungs of a matrix that take fewer bytes than itself.

    Args:
        rows: Of the matrix, as far as the donor has them.
        width: Of a row.
        element_bytes: Of the variant's own type.
    """
    return tuple(
        rung
        for rung in OFFERED
        if 2 * rung.rank <= min(rows, width)
        and residual_bytes(rung, rows, width) < rows * width * element_bytes
    )
