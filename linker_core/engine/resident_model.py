"""A model that the engine serves: what it is made from, and whether it is on its way out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from linker_core.engine.family import Family
from linker_core.engine.messages import LoadModel


@dataclass(slots=True, eq=False)
class ResidentModel:
    """A model that takes requests, or did until its unloading was asked for."""

    name: str
    family: Family
    slot: int
    vocab_size: int
    max_model_len: int
    directory: Path  # of the weights and the tokenizer
    plan_fingerprint: str  # of what is stored for it and where it comes from
    stored_as: str  # what the pool calls it
    unloading: bool = False  # leaves when its last sequence has ended

    @property
    def is_replaced(self) -> bool:
        """Whether another has its name, and it only finishes what it has begun."""
        return self.stored_as != self.name

    @property
    def is_head(self) -> bool:
        """Whether it is the model of its family that others name as their donor."""
        return self.family.name == self.stored_as


def fingerprint_of(message: LoadModel) -> str:
    """Returns a digest of all that decides the weights which a plan's variant is served with.

    The files are part of it: of a delta that somebody else encoded, the variant's fingerprint is
    no more than a claim.
    """
    plan = message.plan
    rungs = sorted((name, str(rung)) for name, rung in plan.rungs.items())
    record = [plan.donor_fingerprint, plan.variant_fingerprint, rungs, message.identity]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
