"""What residency asks of the known models. Knows no SQL; `Roster` is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from server.registry.records import JobStage, ModelRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What becomes of a model that is not served yet."""

    job_id: str
    stage: JobStage | None  # None: it waits for its turn
    remaining_s: float | None  # of the stage; None: nobody knows


class Rows(Protocol):
    """The rows of the models, as they are shown now."""

    def find(self, name: str) -> ModelRecord | None:
        """Returns one model, or None."""

    def named(self, name: str) -> ModelRecord:
        """Returns the model of a name or an alias.

        Raises:
            ModelNotFoundError: There is none.
        """

    def model_of(self, name: str) -> str:
        """Returns the model that clients know what is of this name by."""

    def outlook(self, name: str) -> Outlook | None:
        """Returns what becomes of a model whose job waits or runs; None of others."""

    def amend(self, name: str, **changes: Any) -> None:
        """Changes fields of a row at once; it is stored by the next `write_later`."""

    async def write_later(self) -> None:
        """Stores what was changed and is not stored yet.

        Raises:
            NotReadyError: The registry cannot be written.
        """
