"""The tensors of one base checkpoint that are on the device: what the plans of a family alias."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from linker_core.residency.stored import Stored, StoredTensor
from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import Rung
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from linker_core.weights.safetensors_header import TensorInfo


class BaseStore:
    """Words of a base checkpoint by name. It keeps what resident models reach and no more.

    Args:
        fingerprint: Of the checkpoint.
        config: Its config.
    """

    def __init__(self, fingerprint: str, config: ModelConfig) -> None:
        self.fingerprint = fingerprint
        self._tied = config.tie_word_embeddings
        self._tensors: dict[str, StoredTensor] = {}

    @property
    def entries(self) -> frozenset[StoredTensor]:
        """What there is, each once."""
        return frozenset(self._tensors.values())

    def lent(self, plan: SharePlan) -> dict[str, Stored]:
        """Returns what a plan leans on and is there, by the names that the plan uses."""
        found = ((name, self._tensors.get(self._key(name))) for name in leans_on(plan))
        return {name: stored for name, stored in found if stored is not None}

    def lacks(self, plan: SharePlan) -> bool:
        """Whether a plan leans on what is not there."""
        return any(self._key(name) not in self._tensors for name in leans_on(plan))

    def lacking(self, plan: SharePlan, base: Checkpoint) -> list[TensorInfo]:
        """Returns what a plan leans on and is not there, but is in the base checkpoint."""
        keys = dict.fromkeys(map(self._key, leans_on(plan)))
        absent = (key for key in keys if key not in self._tensors)
        return [base.tensors[key] for key in absent if key in base.tensors]

    def add(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Enters tensors by their names in the base checkpoint; what is there already stays."""
        self._tensors = {**tensors, **self._tensors}

    def keep(self, held: Container[Stored]) -> None:
        """Forgets what is not held any more."""
        self._tensors = {name: entry for name, entry in self._tensors.items() if entry in held}

    def _key(self, name: str) -> str:
        return EMBED_NAME if self._tied and name == LM_HEAD_NAME else name


def leans_on(plan: SharePlan) -> Iterable[str]:
    """Returns the names whose tensor is the base's, in part or with a delta to it."""
    return (name for name, rung in plan.rungs.items() if rung is not Rung.OWN)
