"""Reads the storages that a plan's rungs call for, one section of a pair of checkpoints at a time.

The one place of the tuner that knows what a rung is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.loader import read_tensor
from linker_core.residency.stored import Stored, StoredTensor
from linker_core.sharing.rungs import AnyRung, Residual, Rung
from linker_core.tuning.offered import may_lean, offered_to
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME, parse_key

Rungs = Mapping[str, AnyRung]
Storages = Mapping[str, Stored]


class SectionReader:
    """Storages by tensor and rung; holds one section at a time.

    Args:
        donor: The donor's checkpoint.
        variant: The variant's.
        identical: Tensors whose bytes are equal; they are read once, whatever their rung.
        device: Where the tensors go.
        on_read: Told how many bytes were read.
    """

    def __init__(
        self,
        donor: Checkpoint,
        variant: Checkpoint,
        *,
        identical: frozenset[str],
        device: torch.device,
        on_read: Callable[[int], None],
    ) -> None:
        self._donor = donor
        self._variant = variant
        self._identical = identical
        self._device = device
        self._on_read = on_read
        self._held: dict[tuple[str, AnyRung], Stored] = {}
        self._encoders: dict[str, DeltaEncoder] = {}
        self._sections: dict[int | None, list[str]] = {}
        for name in variant.tensors:
            key = parse_key(name)
            assert key is not None
            self._sections.setdefault(key.layer, []).append(name)

    def names(self, layer: int | None) -> list[str]:
        """Returns the tensors of a block, or those outside the blocks for None."""
        return self._sections[layer]

    def can_alias(self, name: str) -> bool:
        """Whether the donor has a tensor of this name and shape."""
        lent = self._donor.tensors.get(name)
        return lent is not None and lent.shape == self._variant.tensors[name].shape

    def can_lean(self, name: str) -> bool:
        """Whether a matrix has a delta to the donor's; either may have more rows."""
        return may_lean(self._variant.tensors[name], self._donor.tensors.get(name))

    def offered(self, name: str) -> tuple[AnyRung, ...]:
        """Returns the rungs below its own that a tensor which differs from the donor's may take."""
        if name in self._identical:
            return ()
        return offered_to(self._variant.tensors[name], self._donor.tensors.get(name))

    def effective(self, name: str, rung: AnyRung) -> AnyRung:
        """Returns the rung that computes the same: equal bytes alias, own rows make a whole."""
        if name in self._identical:
            return Rung.ALIAS
        return Rung.OWN if rung is Rung.ROWS else rung

    def signature(self, layer: int | None, rungs: Rungs) -> tuple[str, ...]:
        """Returns what of a plan makes the states that leave a section: equal ones are the same.

        Outside the blocks that is the embedding; final norm and head come after all states.
        """
        names = [EMBED_NAME] if layer is None else self.names(layer)
        return tuple(str(self.effective(name, rungs[name])) for name in names)

    def storages(self, layer: int | None, rungs: Rungs) -> dict[str, Stored]:
        """Returns a section's storages under a plan; a tied head maps to the embedding's."""
        found = {name: self.storage(name, rungs[name]) for name in self.names(layer)}
        if layer is None and LM_HEAD_NAME not in found:
            found[LM_HEAD_NAME] = found[EMBED_NAME]
        return found

    def storage(self, name: str, rung: AnyRung) -> Stored:
        """Returns the storage of one tensor on a rung, reading or encoding it if it is not held.

        Raises:
            BadCheckpointError: A file changed, or there is no delta of finite numbers.
        """
        rung = self.effective(name, rung)
        if (name, rung) not in self._held:
            self._held[name, rung] = self.passing(name, rung)
        return self._held[name, rung]

    def passing(self, name: str, rung: AnyRung) -> Stored:
        """Returns the storage of one tensor on a rung; a residual is made anew and not held.

        What all residuals of a matrix have in common is.

        Raises:
            BadCheckpointError: A file changed, or there is no delta of finite numbers.
        """
        rung = self.effective(name, rung)
        if not isinstance(rung, Residual):
            return self.whole(name, rung)
        assert self.can_lean(name), name
        if name not in self._encoders:
            base, variant = self.whole(name, Rung.ALIAS), self.whole(name, Rung.OWN)
            self._encoders[name] = DeltaEncoder(base, variant.tensor)
        return self._encoders[name].encode(rung)

    def whole(self, name: str, rung: AnyRung) -> StoredTensor:
        """Returns a checkpoint's tensor, the donor's for an alias, reading it if it is not held."""
        key = (name, self.effective(name, rung))
        if key not in self._held:
            checkpoint = self._donor if key[1] is Rung.ALIAS else self._variant
            tensor = read_tensor(checkpoint, name, device=self._device)
            self._on_read(tensor.nbytes)
            self._held[key] = StoredTensor(tensor=tensor)
        held = self._held[key]
        assert isinstance(held, StoredTensor)
        return held

    def forget(self, layer: int | None) -> None:
        """Lets go of a section."""
        names = frozenset(self.names(layer))
        self._held = {key: held for key, held in self._held.items() if key[0] not in names}
        for name in names:
            self._encoders.pop(name, None)
