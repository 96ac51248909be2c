"""The bytes that a device has for models: what is held, what is promised, what is left."""

from __future__ import annotations

from linker_core.errors import ConflictError, InsufficientCapacityError
from linker_core.residency.ledger import Ledger


class Budget:
    """One sum for weights, KV pages, what is arriving, and what other processes use.

    Used by one thread, the engine's.

    Args:
        nbytes: All there are. KV pages count in full from their reservation on, though a CPU backs
            them with memory only once they are written.
        ledger: Says what resident models hold.
    """

    def __init__(self, nbytes: int, ledger: Ledger) -> None:
        self._nbytes = nbytes
        self._ledger = ledger
        self._kv_bytes: dict[str, int] = {}  # of its KV cache, by the head of the family
        self._arriving: dict[str, int] = {}  # model -> bytes reserved for its admission
        self._reserved: dict[str, int] = {}  # name -> bytes that another process uses

    def free_bytes(self) -> int:
        """Bytes left."""
        promised = self.arriving_bytes() + self.reserved_bytes()
        return self._nbytes - self._ledger.resident_bytes() - promised - self.kv_bytes()

    def expect(self, model: str, nbytes: int) -> None:
        """Sets bytes aside for what is to be moved of a model.

        Raises:
            InsufficientCapacityError: They do not fit.
        """
        assert model not in self._arriving
        self._require(nbytes, what=f"the weights of {model}")
        self._arriving[model] = nbytes

    def is_expected(self, model: str) -> bool:
        """Whether a model is being admitted."""
        return model in self._arriving

    def lower(self, model: str, nbytes: int) -> None:
        """Lowers what is set aside for a model to what is still to be moved of it."""
        assert nbytes <= self._arriving[model]
        self._arriving[model] = nbytes

    def conclude(self, model: str) -> None:
        """Sets nothing aside for a model any more: it has come, or will not."""
        del self._arriving[model]

    def arriving_bytes(self) -> int:
        """Bytes reserved for what is being admitted."""
        return sum(self._arriving.values())

    def reserve_kv(self, family: str, nbytes: int) -> None:
        """Sets bytes aside for a family's KV cache.

        Raises:
            InsufficientCapacityError: They do not fit.
        """
        assert family not in self._kv_bytes
        self._require(nbytes, what=f"the KV cache of {family}")
        self._kv_bytes[family] = nbytes

    def release_kv(self, family: str) -> None:
        """Gives a family's KV bytes back."""
        del self._kv_bytes[family]

    def rehome(self, head: str, heir: str) -> None:
        """Books a family's KV bytes, if it has any, under its new head."""
        if head in self._kv_bytes:
            self._kv_bytes[heir] = self._kv_bytes.pop(head)

    def kv_bytes(self) -> int:
        """Bytes reserved for KV caches."""
        return sum(self._kv_bytes.values())

    def reserve(self, name: str, nbytes: int) -> None:
        """Sets bytes aside for another process on the same device.

        Raises:
            ConflictError: The name has a reservation already.
            InsufficientCapacityError: They do not fit.
        """
        assert nbytes >= 0
        if name in self._reserved:
            raise ConflictError(f"Memory is reserved for {name} already. Release it first.")
        self._require(nbytes, what=name)
        self._reserved[name] = nbytes

    def release(self, name: str) -> None:
        """Gives a reservation back; harmless when there is none."""
        self._reserved.pop(name, None)

    def reserved_bytes(self) -> int:
        """Bytes set aside for other processes."""
        return sum(self._reserved.values())

    def _require(self, nbytes: int, *, what: str) -> None:
        free = self.free_bytes()
        if nbytes > free:
            raise InsufficientCapacityError(
                f"{nbytes} bytes are needed for {what}, {max(free, 0)} are free. Remove a model, "
                "raise the memory budget, or lower kv_cache_tokens."
            )
