"""The rows of twins: a variant's own weights, unshared, beside the variant. Event loop only.

Residency keeps twins as it keeps models, so it is given these rows; no client sees them, nothing
stores them, and none is a row of the roster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from linker_core.errors import InvalidRequestError, ModelNotFoundError, NotReadyError
from linker_core.sharing.plan import Policy
from linker_core.sharing.rungs import Rung
from server.onboarding.roster import Roster
from server.registry.records import SERVABLE, Json, ModelRecord, ModelState
from server.residency.catalog import Catalog
from server.residency.rows import Outlook

_KEPT_S = 60.0  # after its last request: it holds what the model was onboarded to save
_MAX_CRASHES = 2  # loads that the engine did not survive, until it is left in peace
_PEACE_S = 300.0  # after the last of them; then one more is tried
_LOSSLESS_RUNGS = frozenset({Rung.OWN.value, Rung.ROWS.value})


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """The unshared copy of a variant."""

    name: str  # no model can have it
    owner: str
    created_at: float  # of the owner, which tells it from a later model of its name
    state: ModelState = ModelState.UNLOADED
    plan: Json | None = None  # once it was loaded
    num_crashes: int = 0
    crashed_at: float = 0.0  # by the clock of the rows


class TwinRows:
    """The roster's rows and those of twins, as `Rows`.

    Args:
        roster: The known models.
        catalog: Says what is resident.
        clock: Monotonic seconds.
    """

    def __init__(
        self, roster: Roster, catalog: Catalog, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._clock = clock
        self._twins: dict[str, Twin] = {}

    def unshared(self, record: ModelRecord) -> str:
        """Returns what answers for a model with its own weights: itself, or its twin.

        Raises:
            InvalidRequestError: It came without a checkpoint of its own.
            NotReadyError: The twin of an earlier model of that name is leaving, or the engine has
                not survived its loading lately.
        """
        plan = record.plan
        if plan is None or record.state not in SERVABLE or is_lossless(plan):
            return record.name
        if plan["policy"] in (Policy.DELTA, Policy.ADAPTER):
            raise InvalidRequestError(
                f"The model {record.name!r} came as what it adds to its donor, so it has no "
                "unshared weights. Onboard its checkpoint to compare with them.",
                param="variant_mode",
            )
        name = twin_name(record.name)
        twin = self._twins.get(name)
        if twin is None or (self._is_stale(twin) and self._catalog.get(name) is None):
            twin = Twin(name=name, owner=record.name, created_at=record.created_at)
            self._twins[name] = twin
        if self._is_stale(twin):
            raise NotReadyError(
                f"The unshared weights of an earlier {record.name!r} are leaving; try again."
            )
        peace_s = twin.crashed_at + _PEACE_S - self._clock()
        if twin.num_crashes >= _MAX_CRASHES and peace_s > 0:
            raise NotReadyError(
                f"The engine died repeatedly while it loaded the unshared weights of "
                f"{record.name!r}. The server's log says of what; they are tried again in "
                f"{math.ceil(peace_s)} s.",
                retry_after_s=peace_s,
            )
        return name

    def twin(self, name: str) -> Twin | None:
        """Returns the twin of this name, or None: it is a model's."""
        return self._twins.get(name)

    def note_loaded(self, name: str, plan: Json) -> None:
        """Notes what is stored of a twin that is resident."""
        self._twins[name] = replace(
            self._twins[name], state=ModelState.READY, plan=plan, num_crashes=0
        )

    def note_crash(self, name: str) -> None:
        """Notes that the engine ended while it loaded a twin."""
        twin = self._twins[name]
        self._twins[name] = replace(
            twin, num_crashes=twin.num_crashes + 1, crashed_at=self._clock()
        )

    def owners(self) -> dict[str, str]:
        """Returns the model of every twin."""
        return {twin.name: twin.owner for twin in self._twins.values()}

    def note_moved(self, name: str) -> None:
        """Tells those who follow that a model was opened or closed to requests."""
        if name not in self._twins:
            self._roster.feed.note_model(name)

    # --- Rows ---------------------------------------------------------------------------------

    def find(self, name: str) -> ModelRecord | None:
        """Returns the row of a model or a twin, or None."""
        twin = self._twins.get(name)
        if twin is None:
            return self._roster.find(name)
        return self._row(twin)

    def named(self, name: str) -> ModelRecord:
        """Returns the row of a model, of an alias or of a twin.

        Raises:
            ModelNotFoundError: There is none, or the model of a twin is none any more.
        """
        twin = self._twins.get(name)
        if twin is None:
            return self._roster.named(name)
        if self._is_stale(twin):
            raise ModelNotFoundError(
                f"The model {twin.owner!r} was deleted or onboarded anew meanwhile.", param="model"
            )
        return self._row(twin)

    def model_of(self, name: str) -> str:
        """Returns the model of a twin; of a model, itself."""
        twin = self._twins.get(name)
        return name if twin is None else twin.owner

    def outlook(self, name: str) -> Outlook | None:
        """Returns what becomes of a model whose job waits or runs; a twin has none."""
        return self._roster.outlook(name)

    def amend(self, name: str, **changes: Any) -> None:
        """Changes fields of a row at once; see `Roster.amend`."""
        twin = self._twins.get(name)
        if twin is None:
            self._roster.amend(name, **changes)
        elif self._is_stale(twin) and changes["state"] is ModelState.UNLOADED:
            del self._twins[name]
        else:
            self._twins[name] = replace(twin, state=changes["state"])

    async def write_later(self) -> None:
        """Stores what was changed of models and is not stored yet; see `Roster.write_later`."""
        await self._roster.write_later()

    def _is_stale(self, twin: Twin) -> bool:
        """Whether its model was deleted, onboarded anew, or is not servable any more."""
        owner = self._roster.find(twin.owner)
        return owner is None or owner.created_at != twin.created_at or owner.state not in SERVABLE

    def _row(self, twin: Twin) -> ModelRecord:
        """Returns a twin as a variant of what its model leans on, or of the model, a family's head.

        One whose model is no more leaves as soon as nobody uses it.
        """
        owner = self._roster.find(twin.owner)
        donor = None if owner is None else owner.donor or owner.name
        return ModelRecord(
            name=twin.name,
            source="" if owner is None else owner.source,
            request={},
            state=twin.state,
            position=-1 if owner is None else owner.position,
            created_at=twin.created_at,
            donor=donor,
            family=None if owner is None else owner.family,
            fingerprint=None if owner is None else owner.fingerprint,
            plan=twin.plan,
            keep_alive_s=0.0 if self._is_stale(twin) else _KEPT_S,
        )


def twin_name(owner: str) -> str:
    """Returns the name of a model's twin. No model's name has a space."""
    return f"{owner} (unshared)"


def is_lossless(plan: Json) -> bool:
    """Says whether a model's weights are served bit for bit as they were onboarded."""
    if plan["policy"] in (Policy.DONOR, Policy.EXACT):
        return True
    if plan["policy"] in (Policy.DELTA, Policy.ADAPTER):
        return False
    # What shares only equal bits was priced without being measured on a single token.
    price = plan["price"]
    unmeasured = price is not None and price["tokens"] == 0
    return unmeasured or _LOSSLESS_RUNGS.issuperset(plan["rungs"].values())
