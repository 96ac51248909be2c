"""Who may leave: a model that is nobody's donor, or whose place an heir takes."""

from __future__ import annotations

from linker_core.engine.loading import LoadQueue
from linker_core.engine.resident_model import ResidentModel
from linker_core.engine.residents import Residents
from linker_core.errors import ConflictError


def rehome(served: ResidentModel, heir: str, *, residents: Residents, loading: LoadQueue) -> None:
    """Makes the heir the donor of whoever has `served` as donor or waits for it.

    Raises:
        ConflictError: The heir is of another family, or about to have another plan.
        ModelNotFoundError: It is not loaded.
    """
    if any(load.model == heir for load in loading.pending()):
        raise ConflictError(
            f"The heir '{heir}' of model '{served.name}' is about to be replaced. "
            "Wait until that has ended."
        )
    residents.rehome(served, heir)
    loading.rehome(served.name, heir)


def check_unused(served: ResidentModel, *, residents: Residents, loading: LoadQueue) -> None:
    """Refuses to let a donor go that others have or wait for.

    Raises:
        ConflictError: Lists them.
    """
    name = served.name
    arriving = [load.model for load in loading.pending() if load.donor == name]
    dependants = list(dict.fromkeys([*residents.dependants(name), *arriving]))
    if dependants:
        raise ConflictError(
            f"Model '{name}' is the donor of {', '.join(dependants)}. Unload these first."
        )
