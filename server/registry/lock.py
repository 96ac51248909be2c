"""One server per state directory: a lock that ends with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from linker_core.errors import InvalidRequestError


def make_state(state: Path) -> None:
    """Makes a state directory for its owner alone; one that is there stays as it is.

    Raises:
        InvalidRequestError: It cannot be made.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(state, error) from error


def _unusable(state: Path, error: OSError) -> InvalidRequestError:
    return InvalidRequestError(
        f"The state directory {state} cannot be used: {error.strerror}. Choose another.",
        param="state",
    )


class StateLock:
    """Holds a state directory, made if need be, until `release`.

    Raises:
        InvalidRequestError: The directory cannot be made, or another server holds it.
    """

    def __init__(self, state: Path) -> None:
        make_state(state)
        try:
            self._descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _unusable(state, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise InvalidRequestError(
                f"Another server uses the state directory {state}. Stop it, or choose another.",
                param="state",
            ) from error

    def release(self) -> None:
        """Lets the next server have the directory."""
        os.close(self._descriptor)
