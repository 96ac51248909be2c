"""What operators want of models besides their plans: an alias, a pin, how long they stay unused.

Event loop only; whoever calls holds the roster's `names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from linker_core.errors import ConflictError
from server.onboarding.request import check_name
from server.onboarding.roster import Roster


class Options:
    """Sets options; names and aliases are of one space.

    Args:
        roster: The known models.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    async def set(self, name: str, options: Mapping[str, Any]) -> None:
        """Stores what of a model's options is new.

        Args:
            name: The model.
            options: `alias`, `pinned`, `keep_alive_s`, or some of them. Nothing else changes these
                of a known model, whatever records are saved.

        Raises:
            ModelNotFoundError: There is none of that name.
            InvalidRequestError: An alias that cannot be a name.
            ConflictError: An alias that another model is known by.
            NotReadyError: The registry cannot be written.
        """
        record = self._roster.model(name)
        new = {key: value for key, value in options.items() if getattr(record, key) != value}
        if (alias := new.get("alias")) is not None:
            check_name(alias, param="alias")
            if self._roster.find(alias) is not None:
                raise ConflictError(
                    f"There is a model {alias!r}; choose another alias.", param="alias"
                )
            self.check_no_alias(alias, param="alias")
        if new:
            await self._roster.writes.change(
                lambda: self._roster.model(name), lambda row: replace(row, **new)
            )

    def check_no_alias(self, name: str, *, param: str = "name") -> None:
        """Refuses a name that is an alias.

        Raises:
            ConflictError: It is.
        """
        holders = [model.name for model in self._roster.models() if model.alias == name]
        if holders:
            raise ConflictError(
                f"{name!r} is an alias of the model {holders[0]!r}; choose another name.",
                param=param,
            )
