"""What the fake engine holds: families, heads and bytes as the engine counts them, without tensors.

A tensor is its name in a base checkpoint, with the family's number; what a model has to itself is
one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.engine.messages import LoadModel, ModelBytes
from linker_core.errors import (
    BadCheckpointError,
    ConflictError,
    InsufficientCapacityError,
    ModelNotFoundError,
)
from linker_core.sharing.delta import open_weights
from linker_core.sharing.rungs import Rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME

FREE_BYTES = 1 << 30


@dataclass(eq=False)
class FakeFamily:
    """Who is the head, and whose words its models lean on."""

    head: str
    fingerprint: str
    tied: bool  # whether its base's head is its embedding
    kv_bytes: int


@dataclass
class FakeModel:
    """A resident model."""

    family: FakeFamily
    reached: dict[object, int]  # what it reaches, with bytes
    logical_bytes: int


class FakeMemory:
    """Bytes of models, KV caches and reservations under one budget.

    Args:
        config: The engine's.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.models: dict[str, FakeModel] = {}
        self.reserved: dict[str, int] = {}
        self._config = config
        self._budget_bytes = config.memory_budget_bytes or FREE_BYTES

    def load(self, command: LoadModel, *, leaving: set[str]) -> int:
        """Admits a model and returns the bytes that are moved; raises what the engine reports."""
        known = self.models.get(command.model)
        if command.replaces and (known is None or self.is_head(command.model)):
            raise ConflictError("There is nothing to replace.")
        if not command.replaces and known is not None:
            raise ConflictError(f"Model '{command.model}' is already loaded. Unload it first.")
        family = self._family_for(command, leaving)
        with open_weights(Path(command.path)) as source:
            if (source.identity, source.config) != (command.identity, command.config):
                raise BadCheckpointError("The files changed since validation.")
        model = FakeModel(family, self._reached(command, family), command.plan.logical_bytes)
        held = self._held()
        moved = sum(nbytes for entry, nbytes in model.reached.items() if entry not in held)
        kv_bytes = 0 if command.donor else family.kv_bytes
        if moved + kv_bytes > self.free_bytes():
            raise InsufficientCapacityError(
                f"{moved + kv_bytes} bytes are needed for {command.model}, "
                f"{self.free_bytes()} are free."
            )
        self.models[command.model] = model
        return moved

    def unload(self, model: str) -> None:
        self.models.pop(model, None)

    def rehome(self, head: str, heir: str, *, leaving: set[str]) -> None:
        """Makes another model the head; raises what the engine reports."""
        family = self.models[head].family
        if family.head == heir != head:
            return
        if heir not in self.models or heir in leaving:
            raise ModelNotFoundError(f"The heir '{heir}' is not loaded. Load it first.")
        if family.head != head or self.models[heir].family is not family or heir == head:
            raise ConflictError(f"'{heir}' is no variant of '{head}'.")
        family.head = heir

    def is_head(self, model: str) -> bool:
        return self.models[model].family.head == model

    def dependants(self, head: str) -> list[str]:
        if not self.is_head(head):
            return []
        family = self.models[head].family
        return [
            name for name, other in self.models.items() if other.family is family and name != head
        ]

    def bytes_of(self, name: str) -> ModelBytes:
        """As the ledger says: the head has what no other model has to itself."""
        model = self.models[name]
        unique = self._alone(name)
        if self.is_head(name):
            family = [other for other, of in self.models.items() if of.family is model.family]
            held = dict(entry for other in family for entry in self.models[other].reached.items())
            unique = sum(held.values()) - sum(self._alone(o) for o in family if o != name)
        shared = max(0, model.logical_bytes - unique)
        return ModelBytes(logical=model.logical_bytes, unique=unique, shared=shared)

    def weight_bytes(self) -> int:
        return sum(self._held().values())

    def kv_bytes(self) -> int:
        return sum(of.family.kv_bytes for name, of in self.models.items() if self.is_head(name))

    def free_bytes(self) -> int:
        reserved = sum(self.reserved.values())
        return self._budget_bytes - self.weight_bytes() - self.kv_bytes() - reserved

    def _family_for(self, command: LoadModel, leaving: set[str]) -> FakeFamily:
        plan = command.plan
        if command.donor is None:
            base = command.config if command.base is None else command.base.config
            return FakeFamily(
                head=command.model,
                fingerprint=plan.donor_fingerprint or plan.variant_fingerprint,
                tied=base.tie_word_embeddings,
                kv_bytes=kv_cache_bytes(base, self._config),
            )
        if command.donor not in self.models or command.donor in leaving:
            raise ModelNotFoundError(f"The donor '{command.donor}' is not loaded.", param="donor")
        family = self.models[command.donor].family
        if family.head != command.donor or family.fingerprint != plan.donor_fingerprint:
            raise ConflictError(f"The plan was made for another donor than {command.donor}.")
        return family

    def _reached(self, command: LoadModel, family: FakeFamily) -> dict[object, int]:
        """What the model will reach: all of its base's tensors that it leans on, and its own."""
        plan = command.plan
        if plan.donor_fingerprint is None:
            with Checkpoint.open(Path(command.path)) as own:
                return {(family, name): tensor.nbytes for name, tensor in own.tensors.items()}
        reached: dict[object, int] = {object(): plan.unique_bytes}
        known = self._held()
        missing: list[str] = []
        for name, rung in plan.rungs.items():
            key = EMBED_NAME if family.tied and name == LM_HEAD_NAME else name
            if rung is Rung.OWN:
                continue
            if (family, key) in known:
                reached[family, key] = known[family, key]
            else:
                missing.append(key)
        return reached | {(family, key): self._base_bytes(command, key) for key in missing}

    @staticmethod
    def _base_bytes(command: LoadModel, key: str) -> int:
        if command.base is None:
            raise BadCheckpointError(f"The plan aliases {key}, which the donor does not have.")
        with Checkpoint.open(Path(command.base.path)) as base:
            if (base.identity, base.config) != (command.base.identity, command.base.config):
                raise BadCheckpointError("The checkpoint that was planned against changed.")
            return base.tensors[key].nbytes

    def _held(self) -> dict[object, int]:
        return dict(entry for of in self.models.values() for entry in of.reached.items())

    def _alone(self, name: str) -> int:
        others = {
            entry for other, of in self.models.items() if other != name for entry in of.reached
        }
        return sum(n for entry, n in self.models[name].reached.items() if entry not in others)
