"""Which stored tensors each resident model reaches. Every byte figure is derived from that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from linker_core.errors import ConflictError
from linker_core.residency.stored import Stored

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    """What a model reaches."""

    named: frozenset[Stored]  # what its own names stand for
    reached: frozenset[Stored]  # that, and the tensors which it leans on
    head: str  # of its family; its own name if it is that


class Ledger:
    """Models by name, each with the stored tensors it reaches, in families with a head each.

    A model that is no head has what only it reaches to itself. All else of the family counts as the
    head's, so that the sum over a family is what the family holds. What an arriving model leans on
    stays until it has come or is given up.

    Used by one thread, the engine's.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._arriving: dict[str, _Account] = {}
        self._num_users: Counter[Stored] = Counter()  # models that reach it, arriving or not

    def expect(self, model: str, stored: Iterable[Stored], *, head: str) -> None:
        """Holds what an arriving model leans on until it is added or given up."""
        assert model not in self._accounts
        assert model not in self._arriving
        self._arriving[model] = self._account(stored, head=head)

    def give_up(self, model: str) -> None:
        """Lets go of what an arriving model leans on."""
        self._release(self._arriving.pop(model))

    def add(self, model: str, stored: Iterable[Stored], *, head: str | None) -> None:
        """Enters a model whose tensors are on the device.

        Args:
            model: Its name.
            stored: What its names stand for.
            head: Of the family that it joins; None makes it the head of a new one.
        """
        assert model not in self._accounts
        self._accounts[model] = self._account(stored, head=head or model)
        assert self.is_head(head or model)

    def remove(self, model: str) -> int:
        """Strikes a model; returns the bytes that nobody reaches any more.

        Raises:
            ConflictError: It is the head of others; lists them.
        """
        if dependants := self.dependants(model):
            raise ConflictError(
                f"{model} is the donor of {', '.join(dependants)}. Remove these first.",
                param="model",
            )
        freed = self.unique_bytes(model)
        self._release(self._accounts.pop(model))
        return freed

    def rehome(self, head: str, heir: str) -> None:
        """Makes another model of the family its head; no tensor moves."""
        assert self.is_head(head)
        assert heir in self._accounts
        assert heir in self.dependants(head)
        for accounts in (self._accounts, self._arriving):
            for model in self._family(head, accounts):
                accounts[model] = replace(accounts[model], head=heir)

    def rename(self, model: str, name: str) -> None:
        """Enters a model under another name; it is no head."""
        assert name not in self._accounts
        assert not self.is_head(model)
        self._accounts = _renamed(self._accounts, model, name)

    def models(self) -> list[str]:
        """Returns the names in the order they were entered."""
        return list(self._accounts)

    def is_head(self, model: str) -> bool:
        """Whether the model is the head of its family."""
        return self._accounts[model].head == model

    def head_of(self, model: str) -> str:
        """Returns the head of the family that a model is in or arrives at."""
        return (self._accounts.get(model) or self._arriving[model]).head

    def dependants(self, head: str) -> list[str]:
        """Returns the other models of the family of this head, those arriving included."""
        family = [*self._family(head, self._accounts), *self._family(head, self._arriving)]
        return [model for model in family if model != head]

    def held(self) -> Container[Stored]:
        """Returns the entries that any model reaches."""
        return self._num_users.keys()

    def logical_bytes(self, model: str) -> int:
        """Bytes a separate copy of the model would hold; tied tensors count once."""
        return sum(entry.logical_bytes for entry in self._accounts[model].named)

    def unique_bytes(self, model: str) -> int:
        """Bytes only this model reaches; of a head, all of the family that no other has to itself.

        A model that is no head gives exactly these back when it leaves.
        """
        if not self.is_head(model):
            return self._own_bytes(model)
        others = (name for name in self._family(model, self._accounts) if name != model)
        return self.family_bytes(model) - sum(map(self._own_bytes, others))

    def shared_bytes(self, model: str) -> int:
        """Bytes the model reads that are not its own; none for whoever holds more than it reads."""
        return max(0, self.logical_bytes(model) - self.unique_bytes(model))

    def family_bytes(self, head: str) -> int:
        """Bytes of the union of what a family reaches."""
        accounts = [
            of_all[model]
            for of_all in (self._accounts, self._arriving)
            for model in self._family(head, of_all)
        ]
        return _nbytes(frozenset().union(*(account.reached for account in accounts)))

    def resident_bytes(self) -> int:
        """Bytes of the union of all stored tensors."""
        return _nbytes(self._num_users)

    def check_integrity(self) -> None:
        """Asserts that references are live users, bytes are the union's, no storage is in two."""
        everyone = [*self._accounts.values(), *self._arriving.values()]
        assert self._num_users == Counter(entry for of in everyone for entry in of.reached)
        assert sum(map(self.unique_bytes, self._accounts)) == self.resident_bytes()
        assert all(self.is_head(account.head) for account in everyone)
        heads = {entry: account.head for account in everyone for entry in account.reached}
        for account in everyone:
            assert all(heads[entry] == account.head for entry in account.reached), "two families"
            assert all(entry.base in account.reached for entry in account.named)
        self._check_storages()

    def _check_storages(self) -> None:
        storages: dict[int, torch.Tensor] = {}
        for entry in self._num_users:
            for tensor in entry.tensors:
                storage = tensor.untyped_storage()
                assert storage.nbytes() == tensor.nbytes, "part of a larger storage"
                if tensor.nbytes:  # empty storages all have the same address
                    held = storages.setdefault(storage.data_ptr(), tensor)
                    assert held is tensor, "two entries for one storage"

    def _account(self, stored: Iterable[Stored], *, head: str) -> _Account:
        named = frozenset(stored)
        account = _Account(named=named, reached=named | {e.base for e in named}, head=head)
        self._num_users.update(account.reached)
        return account

    def _release(self, account: _Account) -> None:
        self._num_users -= Counter(account.reached)  # drops what is left with no user

    def _own_bytes(self, model: str) -> int:
        """Bytes that only this model reaches."""
        return _nbytes(e for e in self._accounts[model].reached if self._num_users[e] == 1)

    @staticmethod
    def _family(head: str, accounts: Mapping[str, _Account]) -> list[str]:
        return [model for model, account in accounts.items() if account.head == head]


def _renamed(entries: Mapping[str, _Value], old: str, new: str) -> dict[str, _Value]:
    return {new if key == old else key: value for key, value in entries.items()}


def _nbytes(stored: Iterable[Stored]) -> int:
    return sum(entry.nbytes for entry in stored)
