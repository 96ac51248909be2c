"""The models that can be served, with all a request needs of them. Event loop only.

Resident ones take requests. Of an evicted one the side that is not weights stays here, so that it
comes back without reading anything but weights; of the tokenizers that none but evicted models use
only the last few.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self
from weakref import WeakValueDictionary

from linker_core.sharing.plan import SharePlan
from linker_core.text.template_source import TemplateSource
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Identity

_MAX_UNUSED_TOKENIZERS = 16  # each may hold some 30 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSide:
    """What of a model is not weights, read from the directory of its checkpoint or delta."""

    path: Path
    identity: Identity  # of the weight files when validated
    config: ModelConfig
    tokenizer: Tokenizer
    template: TemplateSource | None
    eos_token_ids: frozenset[int]
    generation: Mapping[str, float | int]
    checkpoint_bytes: int
    outside_blocks_bytes: int  # embedding, final norm and head; 0 of a delta folder
    delta: SharePlan | None = None  # the plan that a delta folder brings; None: a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The checkpoint whose tensors a family shares, where its donor is another model by now."""

    fingerprint: str
    text: TextSide

    @classmethod
    def of(cls, donor: ServedModel) -> Self:
        """Returns the base that a donor with no other is itself."""
        return cls(fingerprint=donor.fingerprint, text=donor.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as it is served."""

    name: str
    donor: str | None
    position: int
    created_at: float
    fingerprint: str
    max_model_len: int
    text: TextSide
    base: Base | None = None  # of a donor that took its family over; else None
    answered_by: str | None = None  # what the engine runs in its place; None: the model itself

    @property
    def engine_name(self) -> str:
        """What the engine knows as whoever answers for the model."""
        return self.answered_by or self.name

    @property
    def lender(self) -> ServedModel:
        """What variants of this donor are compared with: itself, or the base it took over."""
        if self.base is None:
            return self
        return replace(self, base=None, text=self.base.text, fingerprint=self.base.fingerprint)

    @property
    def tokenizers(self) -> set[Tokenizer]:
        """What is by far the largest of what is held of a model beside its weights."""
        return {self.text.tokenizer, self.lender.text.tokenizer}


class Turn(asyncio.Lock):
    """A lock that knows whether anybody holds it or waits for it.

    Nobody waits who takes one that is not wanted: whoever makes room takes only those, so that two
    who make room for each other's models never wait for each other.

    Args:
        on_release: Called whenever somebody gives it back.
    """

    def __init__(self, on_release: Callable[[], None]) -> None:
        super().__init__()
        self._on_release = on_release
        self._num_wanting = 0

    @property
    def wanted(self) -> bool:
        """Whether somebody holds it or waits for it."""
        return self._num_wanting > 0

    async def acquire(self) -> Literal[True]:
        """Takes the lock; at once where it is not wanted."""
        self._num_wanting += 1
        try:
            return await super().acquire()
        except BaseException:
            self._num_wanting -= 1
            raise

    def release(self) -> None:
        """Gives the lock to the next."""
        self._num_wanting -= 1
        super().release()
        self._on_release()


class Catalog:
    """Resident models by name, what uses them, and what is known of evicted ones.

    Args:
        clock: Monotonic seconds.
        max_unused_tokenizers: Of those that none but evicted models use, how many are kept.

    `on_moved` is called with the name of a model that was opened or closed to requests.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_unused_tokenizers: int = _MAX_UNUSED_TOKENIZERS,
    ) -> None:
        self.on_moved: Callable[[str], None] = _ignore
        self._clock = clock
        self._max_unused_tokenizers = max_unused_tokenizers
        self._models: dict[str, ServedModel] = {}
        self._dormant: dict[str, ServedModel] = {}  # the last to leave last
        self._leases: Counter[str] = Counter()
        self._unused: dict[str, asyncio.Event] = {}
        self._idle_since: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._used_at: dict[str, float] = {}
        self._turns: WeakValueDictionary[str, Turn] = WeakValueDictionary()
        self._changed = asyncio.Event()

    def get(self, name: str) -> ServedModel | None:
        """Returns a resident model, or None."""
        return self._models.get(name)

    def dormant(self, name: str) -> ServedModel | None:
        """Returns what an evicted model was served as; None if that is not known any more."""
        return self._dormant.get(name)

    def models(self) -> list[ServedModel]:
        """Returns the resident models, a donor before its variants, else in order of arrival."""
        arrival = {model.name: model.position for model in self._models.values()}

        def order(model: ServedModel) -> tuple[int, bool, int]:
            donor = model.donor or model.name
            return arrival.get(donor, model.position), model.donor is not None, model.position

        return sorted(self._models.values(), key=order)

    def donors(self) -> list[ServedModel]:
        """Returns the models that variants can lean on, then evicted ones that they could.

        What is planned is compared with their `lender`.
        """
        known = [*self.models(), *self._dormant.values()]
        return [model for model in known if model.donor is None]

    def dependants(self, name: str) -> list[str]:
        """Returns the resident models whose donor this is."""
        return [model.name for model in self.models() if model.donor == name]

    def turn(self, name: str) -> Turn:
        """Returns the lock under which a name comes onto the device and leaves it.

        Whoever holds a variant's may wait for its donor's, never the other way round; whoever holds
        any may wait for `Room`, never the other way round.
        """
        turn = self._turns.get(name)
        if turn is None:
            turn = self._turns[name] = Turn(self.note_change)
        return turn

    async def until_changed(self) -> None:
        """Waits until a model comes or leaves, or something ends that kept one where it is."""
        await self._changed.wait()

    def note_change(self) -> None:
        """Ends the waits of `until_changed`."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # --- coming and going ---------------------------------------------------------------------

    def publish(self, model: ServedModel) -> None:
        """Opens a model to requests."""
        self._dormant.pop(model.name, None)
        self._models[model.name] = model
        self._idle_since[model.name] = self._since[model.name] = self._clock()
        self.note_change()
        self.on_moved(model.name)

    def retract(self, name: str) -> None:
        """Closes a model to new requests and forgets it; running ones keep what they hold."""
        self._models.pop(name, None)
        self._dormant.pop(name, None)
        self._idle_since.pop(name, None)
        self._since.pop(name, None)
        self.note_change()

    def park(self, name: str) -> None:
        """Closes a model to new requests, and remembers what it was served as.

        Of those that left long ago this is forgotten where it takes memory of its own.
        """
        self._park(name)
        self._forget_oldest()

    def remember(self, model: ServedModel) -> None:
        """Notes what a model that is not resident would be served as, until others leave."""
        assert model.name not in self._models
        self._dormant.pop(model.name, None)
        self._dormant[model.name] = model

    def rehome(self, name: str, heir: str) -> None:
        """Makes a variant the donor of its family in its donor's place, who becomes its variant."""
        donor = self._models.get(name) or self._dormant.get(name)
        base = None if donor is None else donor.base or Base.of(donor)
        for models in (self._models, self._dormant):
            for model in list(models.values()):
                if model.donor == name or model.name == name:
                    models[model.name] = replace(model, donor=heir, base=None)
        for models in (self._models, self._dormant):
            if (found := models.get(heir)) is not None and base is not None:
                models[heir] = replace(found, donor=None, base=base)
        if base is None:
            self._dormant.pop(heir, None)  # whoever brings it back reads what it leans on

    def clear(self) -> None:
        """Closes every model: the engine is gone. They come back, so nothing is forgotten."""
        for name in list(self._models):
            self._park(name)

    def _park(self, name: str) -> None:
        model = self._models.pop(name, None)
        if model is not None:
            self._dormant.pop(name, None)
            self._dormant[name] = model
            self.note_change()
            self.on_moved(name)

    def _forget_oldest(self) -> None:
        """Keeps what is known of evicted models while it needs no more tokenizers than it may."""
        used = {tokenizer for model in self._models.values() for tokenizer in model.tokenizers}
        kept: set[Tokenizer] = set()
        for name, model in reversed(list(self._dormant.items())):
            needed = kept | (model.tokenizers - used)
            turn = self._turns.get(name)
            moving = turn is not None and turn.wanted  # it may be open again in a moment
            if moving or len(needed) <= self._max_unused_tokenizers:
                kept = needed
            else:
                del self._dormant[name]

    # --- use ----------------------------------------------------------------------------------

    @contextmanager
    def lease(self, name: str) -> Iterator[ServedModel]:
        """Keeps a resident model where it is: nothing evicts what is leased.

        Held by every request from before it is tokenised until its last byte, and by every load
        of a variant on its donor.
        """
        model = self._models[name]
        self._leases[name] += 1
        self.touch(name)
        try:
            yield model
        finally:
            self._leases[name] -= 1
            if not self._leases[name]:
                del self._leases[name]
                if name in self._models:
                    self._idle_since[name] = self._clock()
                self._unused.pop(name, asyncio.Event()).set()
                self.note_change()

    def num_leases(self, name: str) -> int:
        """Returns how many hold a model."""
        return self._leases[name]

    async def until_unused(self, name: str) -> None:
        """Waits until nobody holds a model. Retracted or parked before, it finds no new users."""
        while self._leases[name]:
            await self._unused.setdefault(name, asyncio.Event()).wait()

    def idle_s(self, name: str) -> float:
        """Returns for how long a resident model has not been used; 0 while it is."""
        if self._leases[name]:
            return 0.0
        return self._clock() - self._idle_since[name]

    def resident_s(self, name: str) -> float:
        """Returns for how long a resident model has been open to requests."""
        return self._clock() - self._since[name]

    def touch(self, name: str) -> None:
        """Notes that a model was used now."""
        self._used_at[name] = time.time()

    def take_used(self) -> dict[str, float]:
        """Returns and forgets which models were used since the last call, and when."""
        used, self._used_at = self._used_at, {}
        return used

    def give_back(self, used_at: Mapping[str, float]) -> None:
        """Remembers again what `take_used` returned, where nothing newer is known."""
        self._used_at = {**used_at, **self._used_at}


def _ignore(_name: str) -> None:
    """Nobody follows."""
