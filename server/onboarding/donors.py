"""Which donor a model leans on. Event loop only."""

from __future__ import annotations

from linker_core.errors import ConflictError, ModelNotFoundError
from linker_core.sharing.family import check_same_family, differences
from linker_core.sharing.plan import SharePlan
from linker_core.weights.architecture import ModelConfig
from server.onboarding.adapters import AdapterSide, Source, check_fit, choose_base
from server.onboarding.comparisons import Comparisons, Likeness
from server.onboarding.donor_choice import DonorChoice, first_alike, nearest, none_alike
from server.onboarding.near_names import meant
from server.onboarding.processes import OnStageProgress
from server.onboarding.request import AUTO_DONOR, OnboardRequest
from server.onboarding.timing import Stopwatch
from server.residency.catalog import Catalog, ServedModel, TextSide


class Donors:
    """The donors there are to choose from.

    A donor that took its family over is returned as what it lends: the base's files.

    Args:
        catalog: The resident models.
        comparisons: Knows how close models are.
    """

    def __init__(self, *, catalog: Catalog, comparisons: Comparisons) -> None:
        self._catalog = catalog
        self._comparisons = comparisons

    def choose(self, request: OnboardRequest, source: Source | ModelConfig) -> DonorChoice | None:
        """Returns the donor a model will lean on; None if `compare` has to look at weights first.

        Args:
            request: Names a donor, or leaves it open.
            source: What is onboarded, or its shape. A delta needs the donor that it was made
                against, an adapter the one that it was trained on. A shape leans on the first donor
                of its signature.

        Raises:
            ModelNotFoundError: The named donor is not resident.
            ConflictError: The named donor is a variant itself, or not the one of the delta; or none
                is.
            BadCheckpointError: The named donor is of another family; the differences are named.
            InvalidRequestError: An adapter fits several donors, or none.
        """
        if request.donor == AUTO_DONOR and isinstance(source, TextSide) and source.delta is None:
            return self._nearest(request, source)
        donor = self.likely(request, source)
        if request.donor is None:
            if donor is None:
                return DonorChoice(donor=None, reason="A family of its own was asked for.")
            if isinstance(source, TextSide) and source.delta is None:
                return DonorChoice(donor=donor, reason="Its files are what that family shares.")
        if request.donor not in (None, AUTO_DONOR):
            return DonorChoice(donor=donor, reason="The request names it.")
        if isinstance(source, ModelConfig):
            others = self._others(request)
            return none_alike(others, source) if donor is None else first_alike(donor)
        what = "adapter was trained on" if isinstance(source, AdapterSide) else "delta was made of"
        return DonorChoice(donor=donor, reason=f"It is the one that the {what}.")

    def likely(self, request: OnboardRequest, source: Source | ModelConfig) -> ServedModel | None:
        """Returns the donor as far as it shows without weights; arguments and errors of `choose`.

        Where it is left open, the first one of the model's signature; where a family of its own is
        asked for, the head of the one whose base the model is.
        """
        if isinstance(source, AdapterSide):
            return self._of_adapter(request, source)
        if isinstance(source, TextSide) and source.delta is not None:
            return self._of_delta(request, source.config, source.delta)
        config = source.config if isinstance(source, TextSide) else source
        if request.donor is None:
            return self._of_base(request, source) if isinstance(source, TextSide) else None
        if request.donor == AUTO_DONOR:
            return next(iter(self._alike(request, config)), None)
        donor = self._named(request.donor)
        check_same_family(donor.text.config, config)
        return donor

    async def compare(
        self,
        request: OnboardRequest,
        source: Source | ModelConfig,
        *,
        watch: Stopwatch,
        on_progress: OnStageProgress,
    ) -> None:
        """Looks at the weights of a model and its candidates, if that decides about its donor.

        The caller holds the planner's turn.

        Args:
            request: Names a donor, or leaves it open.
            source: See `choose`.
            watch: Takes the seconds.
            on_progress: Hears of each progress line.

        Raises:
            BadCheckpointError: See `Comparisons.make`.
        """
        if request.donor == AUTO_DONOR and isinstance(source, TextSide) and source.delta is None:
            await self._comparisons.make(
                source,
                self._alike(request, source.config),
                watch=watch,
                on_progress=on_progress,
            )

    async def settle(
        self,
        request: OnboardRequest,
        source: Source | ModelConfig,
        *,
        watch: Stopwatch,
        on_progress: OnStageProgress,
    ) -> DonorChoice:
        """Compares and chooses; arguments and errors of both. The caller holds the turn."""
        while True:
            await self.compare(request, source, watch=watch, on_progress=on_progress)
            if (choice := self.choose(request, source)) is not None:
                return choice

    def _nearest(self, request: OnboardRequest, text: TextSide) -> DonorChoice | None:
        """Returns the closest donor, or none; None if one was not compared yet."""
        found: list[tuple[ServedModel, Likeness]] = []
        for donor in self._alike(request, text.config):
            likeness = self._comparisons.known(text, donor)
            if likeness is None:
                return None
            found.append((donor, likeness))
        return nearest(found) if found else none_alike(self._others(request), text.config)

    def _others(self, request: OnboardRequest) -> list[ServedModel]:
        return [d.lender for d in self._catalog.donors() if d.name != request.name]

    def _alike(self, request: OnboardRequest, config: ModelConfig) -> list[ServedModel]:
        """Returns the donors of an architecture's signature, in their order of arrival."""
        return [d for d in self._others(request) if not differences(d.text.config, config)]

    def _of_base(self, request: OnboardRequest, text: TextSide) -> ServedModel | None:
        """Returns what a family lends whose base is this very checkpoint, though no model of it.

        Its first donor was deleted, and comes anew. It would found a second family of the same
        tensors.
        """
        for head in self._catalog.donors():
            shared = None if head.base is None or head.name == request.name else head.base.text
            if shared and (shared.identity, shared.config) == (text.identity, text.config):
                return head.lender
        return None

    def _of_delta(
        self, request: OnboardRequest, config: ModelConfig, delta: SharePlan
    ) -> ServedModel:
        if request.donor in (None, AUTO_DONOR):
            donor = next(
                (d for d in self._others(request) if d.fingerprint == delta.donor_fingerprint), None
            )
        else:
            assert request.donor is not None
            donor = self._named(request.donor)
        if donor is None or donor.fingerprint != delta.donor_fingerprint:
            who = (
                "No resident donor" if donor is None else f"The donor {donor.name!r} does not have"
            )
            has = " has" if donor is None else ""
            raise ConflictError(
                f"{who}{has} the fingerprint {delta.donor_fingerprint}, which the delta was made "
                "against. Onboard that very checkpoint first, as a donor.",
                param="donor",
            )
        check_same_family(donor.text.config, config)
        return donor

    def _of_adapter(self, request: OnboardRequest, adapter: AdapterSide) -> ServedModel:
        if request.donor in (None, AUTO_DONOR):
            return choose_base(self._others(request), adapter)
        assert request.donor is not None
        donor = self._named(request.donor)
        check_fit(adapter, donor.text.config)
        return donor

    def _known(self, name: str) -> ServedModel | None:
        return self._catalog.get(name) or self._catalog.dormant(name)

    def _named(self, name: str) -> ServedModel:
        donor = self._known(name)
        if donor is None:
            near = meant(name, [head.name for head in self._catalog.donors()])
            raise ModelNotFoundError(
                f"The donor {name[:200]!r} is not resident; onboard it first.{near}", param="donor"
            )
        head = donor if donor.donor is None else self._known(donor.donor)
        if head is None or donor.fingerprint not in (head.fingerprint, head.lender.fingerprint):
            raise ConflictError(
                f"{donor.name!r} is a variant of {donor.donor!r}; name that as donor.",
                param="donor",
            )
        return head.lender  # of a donor whose family another has taken over, the same weights
