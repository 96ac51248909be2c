"""The models that the engine can serve now, and how they come and go.

Loading is a generator: the engine advances it in slices between steps, so that serving goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from linker_core.config import EngineConfig
from linker_core.engine.background import in_background
from linker_core.engine.devices import activation_dtype
from linker_core.engine.family import Family, kv_shape
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.engine.messages import LoadModel, ModelBytes
from linker_core.errors import BadCheckpointError, ConflictError, ModelNotFoundError
from linker_core.residency.pool import Pool
from linker_core.sharing.family import check_same_family
from linker_core.sharing.plan import SharePlan
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint


@dataclass(slots=True, eq=False)
class ResidentModel:
    """A model that takes requests, or did until its unloading was asked for."""

    name: str
    family: Family
    slot: int
    vocab_size: int
    max_model_len: int
    directory: Path  # of the checkpoint
    plan_fingerprint: str  # of what is stored for it and where it comes from
    unloading: bool = False  # leaves when its last sequence has ended


class Residents:
    """Models by name, families by their donor's name.

    Args:
        config: The engine's settings.
        device: Where weights and pages lie.
    """

    def __init__(self, config: EngineConfig, *, device: torch.device) -> None:
        self.pool = Pool(device=device, budget_bytes=config.memory_budget_bytes)
        self.families: dict[str, Family] = {}
        self.served: dict[str, ResidentModel] = {}
        # Counted by families that have gone.
        self.past_preemptions = 0
        self.past_prefix_queries = 0
        self.past_prefix_hits = 0
        self._config = config
        self._device = device
        # Slots are never used twice, so nothing can be mistaken for a model that has gone.
        self._slots = itertools.count()
        self._dtype = activation_dtype(device)

    def load(self, message: LoadModel) -> Generator[int, None, ResidentModel]:
        """Makes a model resident; all or nothing, also when the generator is closed early.

        Yields:
            Bytes moved so far, 0 before the first of them is read.

        Returns:
            The model, ready for requests.

        Raises:
            LinkerError: Bad or changed checkpoint, no such donor, or not enough memory.
        """
        if message.model in self.served:
            raise ConflictError(f"Model '{message.model}' is already loaded. Unload it first.")
        with Checkpoint.open(Path(message.path)) as checkpoint:
            _check_unchanged(message, checkpoint)
            family = self._family_for(message, checkpoint.config)
            try:
                resident = yield from self.pool.admit(
                    message.model, checkpoint, message.plan, message.donor
                )
                try:
                    # Once more: what was rewritten while it was read is torn.
                    _check_unchanged(message, checkpoint)
                    # Code that is new to this machine; no step waits for its compilation.
                    for _ in in_background(partial(family.runner.warm_up, resident.tensors)):
                        yield message.plan.unique_bytes
                    slot = next(self._slots)
                    family.runner.bind(slot, resident.tensors)
                except BaseException:
                    self.pool.remove(message.model)
                    raise
            except BaseException:
                if message.donor is None:
                    self._drop(family)
                raise
        return self._serve(message, family, resident.config, slot)

    def unload(self, served: ResidentModel) -> None:
        """Gives a model's unique bytes back. It has no sequences and no dependants."""
        del self.served[served.name]
        served.family.runner.unbind(served.slot)
        self.pool.remove(served.name)
        if served.family.name == served.name:
            self._drop(served.family)

    def dependants(self, name: str) -> list[str]:
        """Returns the models that read from `name`'s storage."""
        return self.pool.ledger.dependants(name) if name in self.served else []

    def bytes_of(self, name: str) -> ModelBytes:
        """Returns what the ledger says of a resident model."""
        ledger = self.pool.ledger
        return ModelBytes(
            logical=ledger.logical_bytes(name),
            unique=ledger.unique_bytes(name),
            shared=ledger.shared_bytes(name),
        )

    def _family_for(self, message: LoadModel, model: ModelConfig) -> Family:
        if message.donor is not None:
            donor = self.served.get(message.donor)
            if donor is None or donor.unloading:
                raise ModelNotFoundError(
                    f"The donor '{message.donor}' of model '{message.model}' is not loaded. "
                    "Load it first.",
                    param="donor",
                )
            if donor.family.name != donor.name:
                raise ConflictError(
                    f"'{message.donor}' is itself a variant of '{donor.family.name}'. "
                    "Name that one as the donor."
                )
            check_same_family(donor.family.model, model)
            return donor.family
        shape = kv_shape(model, self._config, dtype=self._dtype)
        self.pool.reserve_kv(message.model, kv_cache_bytes(model, self._config))
        try:
            family = Family(message.model, model, shape, config=self._config, device=self._device)
        except BaseException:
            self.pool.release_kv(message.model)
            raise
        self.families[message.model] = family
        return family

    def _drop(self, family: Family) -> None:
        del self.families[family.name]
        self.past_preemptions += family.scheduler.num_preemptions
        self.past_prefix_queries += family.scheduler.prefix_queries
        self.past_prefix_hits += family.scheduler.prefix_hits
        self.pool.release_kv(family.name)

    def _serve(
        self, message: LoadModel, family: Family, model: ModelConfig, slot: int
    ) -> ResidentModel:
        limits = [model.max_position_embeddings, family.cache.shape.num_tokens]
        if message.max_model_len is not None:
            limits.append(message.max_model_len)
        served = ResidentModel(
            name=message.model,
            family=family,
            slot=slot,
            vocab_size=model.vocab_size,
            max_model_len=min(limits),
            directory=Path(message.path),
            plan_fingerprint=_fingerprint(message.plan),
        )
        self.served[message.model] = served
        return served


def _fingerprint(plan: SharePlan) -> str:
    """Returns a digest of all that decides the weights which a plan's variant is served with."""
    rungs = sorted((name, str(rung)) for name, rung in plan.rungs.items())
    record = json.dumps([plan.donor_fingerprint, plan.variant_fingerprint, rungs])
    return hashlib.sha256(record.encode()).hexdigest()


def _check_unchanged(message: LoadModel, checkpoint: Checkpoint) -> None:
    """Refuses files that are not those which were validated and planned for.

    Raises:
        BadCheckpointError: Weights or config have changed.
    """
    if (checkpoint.identity, checkpoint.config) != (message.identity, message.config):
        raise BadCheckpointError(
            f"The files of model '{message.model}' changed since validation. "
            "Onboard it again when they are complete."
        )
