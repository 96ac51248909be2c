"""Which donor a model leans on. Event loop only."""

from __future__ import annotations

from linker_core.errors import BadCheckpointError, ConflictError, ModelNotFoundError
from linker_core.sharing.family import check_same_family
from linker_core.sharing.plan import SharePlan
from linker_core.weights.architecture import ModelConfig
from server.onboarding.adapters import AdapterSide, Source, check_fit, choose_base
from server.onboarding.request import AUTO_DONOR, OnboardRequest
from server.residency.catalog import Catalog, ServedModel, TextSide


def choose_donor(
    catalog: Catalog, request: OnboardRequest, source: Source | ModelConfig
) -> ServedModel | None:
    """Returns the donor a model will lean on; None makes it the donor of a new family.

    Args:
        catalog: The resident models.
        request: Names a donor, or leaves it open.
        source: What is onboarded, or its shape. A delta needs the donor that it was made against,
            an adapter the one that it was trained on.

    Raises:
        ModelNotFoundError: The named donor is not resident.
        ConflictError: The named donor is a variant itself, or not the one of the delta; or none is.
        BadCheckpointError: The named donor is of another family; the differences are named.
        InvalidRequestError: An adapter fits several donors, or none.
    """
    if isinstance(source, AdapterSide):
        return _donor_of_adapter(catalog, request, source)
    if isinstance(source, TextSide) and source.delta is not None:
        return _donor_of_delta(catalog, request, source.config, source.delta)
    config = source.config if isinstance(source, TextSide) else source
    if request.donor is None:
        return None
    if request.donor == AUTO_DONOR:
        others = (donor for donor in catalog.donors() if donor.name != request.name)
        return next((d for d in others if _is_same_family(d.text.config, config)), None)
    donor = _named_donor(catalog, request.donor)
    check_same_family(donor.text.config, config)
    return donor


def _donor_of_delta(
    catalog: Catalog, request: OnboardRequest, config: ModelConfig, delta: SharePlan
) -> ServedModel:
    if request.donor in (None, AUTO_DONOR):
        donors = (donor for donor in catalog.donors() if donor.name != request.name)
        donor = next((d for d in donors if d.fingerprint == delta.donor_fingerprint), None)
    else:
        assert request.donor is not None
        donor = _named_donor(catalog, request.donor)
    if donor is None or donor.fingerprint != delta.donor_fingerprint:
        who = "No resident donor" if donor is None else f"The donor {donor.name!r} does not have"
        has = " has" if donor is None else ""
        raise ConflictError(
            f"{who}{has} the fingerprint {delta.donor_fingerprint}, which the delta was made "
            "against. Onboard that very checkpoint first, as a donor.",
            param="donor",
        )
    check_same_family(donor.text.config, config)
    return donor


def _donor_of_adapter(
    catalog: Catalog, request: OnboardRequest, adapter: AdapterSide
) -> ServedModel:
    if request.donor in (None, AUTO_DONOR):
        return choose_base(catalog, request, adapter)
    assert request.donor is not None
    donor = _named_donor(catalog, request.donor)
    check_fit(adapter, donor.text.config)
    return donor


def _named_donor(catalog: Catalog, name: str) -> ServedModel:
    donor = catalog.get(name)
    if donor is None:
        raise ModelNotFoundError(
            f"The donor {name!r} is not resident; onboard it first.", param="donor"
        )
    if donor.donor is not None:
        raise ConflictError(
            f"{donor.name!r} is a variant of {donor.donor!r}; name that as donor.",
            param="donor",
        )
    return donor


def _is_same_family(donor: ModelConfig, variant: ModelConfig) -> bool:
    try:
        check_same_family(donor, variant)
    except BadCheckpointError:
        return False
    return True
