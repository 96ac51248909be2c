"""Opens the checkpoints that a command line names, and says which of them is at fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linker_core.errors import LinkerError, from_record
from linker_core.weights.checkpoint import Checkpoint


@contextmanager
def open_pair(donor: Path, variant: Path) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Yields both checkpoints, open and validated.

    Raises:
        LinkerError: As `Checkpoint.open`, the directory named before the reason.
    """
    with open_checkpoint("donor", donor) as a, open_checkpoint("variant", variant) as b:
        yield a, b


def open_checkpoint(role: str, path: Path) -> Checkpoint:
    """Opens one checkpoint.

    Raises:
        LinkerError: As `Checkpoint.open`, role and directory named before the reason.
    """
    try:
        return Checkpoint.open(path)
    except LinkerError as error:
        record = error.to_record() | {"message": f"{role} {path}: {error.message}"}
        raise from_record(record) from error
