"""Bytes as the commands write them: always in MiB, so that two of them compare at a glance.

`linker top` alone has a shorter form, for columns of six characters.
"""

from __future__ import annotations

MIB = 2**20


def mib(num_bytes: int) -> str:
    """Returns a size in a sentence, as `14.0 MiB`."""
    return f"{num_bytes / MIB:.1f} MiB"


def mib_cell(num_bytes: int) -> str:
    """Returns a size below a head that says MiB, where small parts stand: `0.21`."""
    return f"{num_bytes / MIB:.2f}"
