"""Which checkpoints a study of each family is about. Knows rows alone, and opens nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from linker_core.errors import LinkerError
from linker_core.sharing.plan import Policy
from server.registry.records import SERVABLE, ModelRecord, StudyRecord

MIN_VARIANTS = 2
METHOD = 2  # raised whenever `analysis.worker` finds other numbers, or writes them otherwise
_NO_WEIGHTS = (Policy.DELTA.value, Policy.ADAPTER.value)  # sources that are no whole checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A checkpoint of a study."""

    name: str | None  # None: a base that no model is left of
    fingerprint: str


_LEFT_OUT = " that can be read; those left out are tried again when their files have changed"
_NOBODY: Mapping[Member, LinkerError] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a study of one family would read now."""

    label: str  # the donor's name
    base: Member | None  # None: it is not known yet
    variants: tuple[Member, ...] = ()
    same_weights: dict[str, str] = field(default_factory=dict)  # a model -> the variant it equals
    left_out: Mapping[Member, LinkerError] = field(default_factory=dict)  # and why
    key: str | None = None  # of the study; None: there is none to be made
    why_not: str | None = None  # where there is none

    def matches(self, study: StudyRecord) -> bool:
        """Whether a study is about this family, and of weights that its members have."""
        # A study from when it could still be read is as true of what is left out now.
        known = (*self.variants, *self.left_out)
        weights = {member.name: member.fingerprint for member in known}
        weights |= {copy: weights[name] for copy, name in self.same_weights.items()}
        return (
            study.family == self.label
            and self.base is not None
            and study.base.get("fingerprint") == self.base.fingerprint
            and bool(study.variants)
            and all(weights.get(name) == digest for name, digest in study.variants.items())
        )

    def new_study(self, *, at: float) -> StudyRecord:
        """Returns the row of a study that begins now, in seconds since the epoch."""
        assert self.key is not None
        assert self.base is not None
        return StudyRecord(
            key=self.key,
            family=self.label,
            base={"name": self.base.name, "fingerprint": self.base.fingerprint},
            variants={str(member.name): member.fingerprint for member in self.variants},
            created_at=at,
        )


def families_of(
    models: Sequence[ModelRecord], unfit: Mapping[Member, LinkerError] = _NOBODY
) -> dict[str, Family]:
    """Returns the families of models by label, in order of arrival.

    Args:
        models: All that are known.
        unfit: Variants to leave out, and why.
    """
    members: dict[str, list[ModelRecord]] = {}
    for model in sorted(models, key=lambda model: model.position):
        members.setdefault(model.family or model.name, []).append(model)
    return {label: _family(label, found, unfit) for label, found in members.items()}


def _family(label: str, models: list[ModelRecord], unfit: Mapping[Member, LinkerError]) -> Family:
    base = _base(label, models)
    if base is None:
        return Family(label=label, base=None, why_not="Its base is not onboarded yet.")
    variants: dict[str, Member] = {}  # by fingerprint
    same: dict[str, str] = {}
    left_out: dict[Member, LinkerError] = {}
    for model in models:
        if model.name == base.name or not _has_weights(model):
            continue
        assert model.fingerprint is not None
        member = Member(name=model.name, fingerprint=model.fingerprint)
        if member in unfit:
            left_out[member] = unfit[member]
            continue
        first = variants.setdefault(model.fingerprint, member)
        if first.name != model.name:  # counted once: it says nothing new
            same[model.name] = str(first.name)
    study = tuple(variants.values())
    if len(study) < MIN_VARIANTS:
        return Family(
            label=label,
            base=base,
            variants=study,
            same_weights=same,
            left_out=left_out,
            why_not=f"A study needs {MIN_VARIANTS} variants with checkpoints of their own beside "
            f"the base; there {'is' if len(study) == 1 else 'are'} {len(study)}"
            f"{_LEFT_OUT if left_out else ''}.",
        )
    return Family(
        label=label,
        base=base,
        variants=study,
        same_weights=same,
        left_out=left_out,
        key=_key(label, base, study),
    )


def _base(label: str, models: list[ModelRecord]) -> Member | None:
    """Returns what the family's tensors are compared with; see `ServedModel.lender`."""
    donor = next((model for model in models if model.name == label), None)
    if donor is None or donor.plan is None or donor.fingerprint is None:
        return None
    digest = donor.plan.get("donor_fingerprint") or donor.fingerprint
    # Of a donor that took its family over, the base may be a variant by now, or no model at all.
    held = [m for m in models if m.fingerprint == digest and _has_weights(m)]
    held.sort(key=lambda model: model.name != label)
    if not held and digest == donor.fingerprint:
        return None
    return Member(name=held[0].name if held else None, fingerprint=digest)


def _has_weights(model: ModelRecord) -> bool:
    """Whether a model can be served, from a whole checkpoint."""
    return (
        model.state in SERVABLE
        and model.fingerprint is not None
        and model.plan is not None
        and model.plan.get("policy") not in _NO_WEIGHTS
    )


def _key(label: str, base: Member, variants: Sequence[Member]) -> str:
    said = [METHOD, label, base.name, base.fingerprint, [[m.name, m.fingerprint] for m in variants]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
