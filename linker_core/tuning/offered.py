"""Which rungs a matrix is offered between the donor's tensor and one of its own."""

from __future__ import annotations

from typing import Final

from linker_core.sharing.rungs import Residual, parse_rung, residual_bytes

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
