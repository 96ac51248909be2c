"""Who computes a prefix that several sequences begin with: one of them, while the others wait.

Without it, requests that arrive together would each compute their common prompt, since nothing of
it can be found until it has been computed. One such record per variant; others share no prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from linker_core.engine.sequence import SequenceState


class PrefixTurns:
    """The pages that running sequences are about to compute, and the sequences that wait for them.

    A waiting sequence goes on when its page is there, and also when the one that was to compute it
    is gone, so nothing waits for what nobody does.
    """

    def __init__(self) -> None:
        self._computing: dict[bytes, SequenceState] = {}
        self._waiters: dict[bytes, dict[SequenceState, None]] = {}
        self._awaited: dict[SequenceState, bytes] = {}  # the same the other way round

    def waiting(self) -> Iterable[SequenceState]:
        """Returns the sequences that are held back."""
        return self._awaited.keys()

    def claim(self, sequence: SequenceState, keys: Iterable[bytes]) -> None:
        """Says that `sequence` computes the pages of `keys`, where nobody else does."""
        for key in keys:
            self._computing.setdefault(key, sequence)

    def hold_back(self, sequence: SequenceState, keys: Sequence[bytes]) -> bool:
        """Lets `sequence` wait if its next pages are being computed by one no less urgent.

        Args:
            sequence: Waiting.
            keys: Of the pages it needs next, in their order.

        Returns:
            Whether it is held back.
        """
        owner = self._computing.get(keys[0]) if keys else None
        if owner is None or owner.priority > sequence.priority:
            return False
        # Waits for the last that both need; all before it are there then.
        last = 0
        while last + 1 < len(keys) and self._computing.get(keys[last + 1]) is owner:
            last += 1
        self._waiters.setdefault(keys[last], {})[sequence] = None
        self._awaited[sequence] = keys[last]
        return True

    def settle(self, key: bytes) -> list[SequenceState]:
        """Notes that a page is there; returns who goes on."""
        self._computing.pop(key, None)
        return self._resume(key)

    def leave(self, sequence: SequenceState, keys: Iterable[bytes]) -> list[SequenceState]:
        """Notes that `sequence` computes the pages of `keys` no more; returns who goes on."""
        resumed: list[SequenceState] = []
        for key in keys:
            if self._computing.get(key) is sequence:
                del self._computing[key]
                resumed += self._resume(key)
        return resumed

    def discard(self, sequence: SequenceState) -> None:
        """Forgets a sequence that is held back."""
        key = self._awaited.pop(sequence)
        del self._waiters[key][sequence]

    def check_integrity(self, running: Iterable[SequenceState]) -> None:
        """Asserts that whoever waits does so for a running sequence."""
        assert set(self._computing.values()) <= set(running)
        assert self._waiters.keys() <= self._computing.keys(), "a page is awaited in vain"
        awaited = {s: key for key, waiters in self._waiters.items() for s in waiters}
        assert awaited == self._awaited

    def _resume(self, key: bytes) -> list[SequenceState]:
        resumed = list(self._waiters.pop(key, ()))
        for sequence in resumed:
            del self._awaited[sequence]
        return resumed
