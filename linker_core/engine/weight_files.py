"""The files that a model is loaded from: its own, and the base's that its plan was made against."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

from linker_core.engine.messages import LoadModel
from linker_core.errors import BadCheckpointError
from linker_core.residency.reading import Source
from linker_core.sharing.delta import open_weights
from linker_core.weights.checkpoint import Checkpoint


class WeightFiles:
    """What is open while a model is loaded; use it in a `with` statement.

    Args:
        message: Names the files, and says what they were at validation.

    Raises:
        LinkerError: The model's own cannot be opened.
    """

    def __init__(self, message: LoadModel) -> None:
        self._message = message
        self._open = ExitStack()
        self.own: Source = open_weights(Path(message.path))
        self._open.callback(self.own.close)
        self.base: Checkpoint | None = None  # only if something has to be read of it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._open.close()

    def open_base(self) -> None:
        """Opens the base's, if the message names any.

        Raises:
            LinkerError: They cannot be opened.
        """
        if self._message.base is not None:
            base = Checkpoint.open(Path(self._message.base.path))
            self.base = self._open.enter_context(base)

    def check_unchanged(self) -> None:
        """Refuses files that are not those which were validated and planned for.

        Raises:
            BadCheckpointError: Weights or config have changed.
        """
        message, own, base = self._message, self.own, self.base
        if (own.identity, own.config) != (message.identity, message.config):
            raise BadCheckpointError(
                f"The files of model '{message.model}' changed since validation. "
                "Onboard it again when they are complete."
            )
        known = message.base
        if base and known and (base.identity, base.config) != (known.identity, known.config):
            raise BadCheckpointError(
                f"The checkpoint that model '{message.model}' was planned against changed since "
                "validation. Put it back, or onboard both again."
            )
