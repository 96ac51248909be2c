"""The models that can be served now, with all a request needs of them. Event loop only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from linker_core.sharing.plan import SharePlan
from linker_core.text.chat_template import ChatTemplate
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSide:
    """What of a model is not weights, read from the directory of its checkpoint or delta."""

    path: Path
    identity: Identity  # of the weight files when validated
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_token_ids: frozenset[int]
    generation: Mapping[str, float | int | bool]
    checkpoint_bytes: int
    outside_blocks_bytes: int  # embedding, final norm and head; 0 of a delta folder
    delta: SharePlan | None = None  # the plan that a delta folder brings; None: a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A resident model."""

    name: str
    donor: str | None
    position: int
    created_at: float
    fingerprint: str
    max_model_len: int
    text: TextSide


class Catalog:
    """The resident models by name."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}
        self._used_at: dict[str, float] = {}

    def get(self, name: str) -> ServedModel | None:
        """Returns a resident model, or None."""
        return self._models.get(name)

    def models(self) -> list[ServedModel]:
        """Returns the resident models, a donor before its variants, else in order of arrival."""
        arrival = {model.name: model.position for model in self._models.values()}

        def order(model: ServedModel) -> tuple[int, bool, int]:
            donor = model.donor or model.name
            return arrival.get(donor, model.position), model.donor is not None, model.position

        return sorted(self._models.values(), key=order)

    def donors(self) -> list[ServedModel]:
        """Returns the models that variants can lean on."""
        return [model for model in self.models() if model.donor is None]

    def publish(self, model: ServedModel) -> None:
        """Opens a model to requests."""
        self._models[model.name] = model

    def retract(self, name: str) -> None:
        """Closes a model to new requests; running ones keep what they hold."""
        self._models.pop(name, None)

    def clear(self) -> None:
        """Closes every model: the engine is gone."""
        self._models.clear()

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
