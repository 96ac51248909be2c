"""Which donor a model leans on. Event loop only."""

from __future__ import annotations

from linker_core.errors import BadCheckpointError, ConflictError, ModelNotFoundError
from linker_core.sharing.family import check_same_family
from linker_core.weights.architecture import ModelConfig
from server.onboarding.catalog import Catalog, ServedModel
from server.onboarding.request import AUTO_DONOR, OnboardRequest


def choose_donor(
    catalog: Catalog, request: OnboardRequest, config: ModelConfig
) -> ServedModel | None:
    """Returns the donor a model will lean on; None makes it the donor of a new family.

    Raises:
        ModelNotFoundError: The named donor is not resident.
        ConflictError: The named donor is a variant itself.
        BadCheckpointError: The named donor is of another family; the differences are named.
    """
    if request.donor is None:
        return None
    if request.donor == AUTO_DONOR:
        others = (donor for donor in catalog.donors() if donor.name != request.name)
        return next((d for d in others if _is_same_family(d.text.config, config)), None)
    donor = catalog.get(request.donor)
    if donor is None:
        raise ModelNotFoundError(
            f"The donor {request.donor!r} is not resident; onboard it first.", param="donor"
        )
    if donor.donor is not None:
        raise ConflictError(
            f"{donor.name!r} is a variant of {donor.donor!r}; name that as donor.",
            param="donor",
        )
    check_same_family(donor.text.config, config)
    return donor


def _is_same_family(donor: ModelConfig, variant: ModelConfig) -> bool:
    try:
        check_same_family(donor, variant)
    except BadCheckpointError:
        return False
    return True
