"""Gauges of the known models, resident or not, and of the device's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from linker_core.engine.messages import ModelBytes, ModelLoad, Snapshot
from server.metrics.families import FAMILIES
from server.metrics.text import header, series, template
from server.metrics.view import View
from server.registry.records import ModelRecord, ModelState

_WEIGHTS, _STATE = FAMILIES["linker_model_weight_bytes"], FAMILIES["linker_model_state"]
_RUNNING = FAMILIES["linker_num_requests_running"]
_WAITING = FAMILIES["linker_num_requests_waiting"]
_FAMILY, _DEVICE = FAMILIES["linker_family_weight_bytes"], FAMILIES["linker_device_memory_bytes"]
_NOTHING = ModelBytes(logical=0, unique=0, shared=0)
_IDLE = ModelLoad(running=0, waiting=0)


class _Lines:
    """The lines of one model, without their values."""

    def __init__(self, model: str, family: str) -> None:
        self.family = family
        labels = {"model": model}
        self.weights = template(
            series(_WEIGHTS.name, {**labels, "family": family, "kind": kind})
            for kind in ("logical", "unique", "shared")
        )
        self.states = template(
            series(_STATE.name, {**labels, "state": state.value}) for state in ModelState
        )
        self.running = template([series(_RUNNING.name, labels)])
        self.waiting = template([series(_WAITING.name, labels)])


class FleetSeries:
    """Memory, state and load of every known model. One thread at a time may render."""

    def __init__(self) -> None:
        self._lines: dict[str, _Lines] = {}  # by model

    def render(self, view: View) -> Iterable[str]:
        """Yields every family of gauges."""
        twins = {owner: twin for twin, owner in view.twins.items()}
        self._lines = {model.name: self._lines_of(model) for model in view.models}
        yield from self._memory(view.snapshot, twins)
        yield from _device(view.snapshot)
        yield from self._states(view.models)
        yield from self._load(view.snapshot, twins)

    def _lines_of(self, model: ModelRecord) -> _Lines:
        family = model.family or model.name
        known = self._lines.get(model.name)
        return known if known and known.family == family else _Lines(model.name, family)

    def _memory(self, snapshot: Snapshot | None, twins: Mapping[str, str]) -> Iterable[str]:
        held = {} if snapshot is None else snapshot.models
        families: dict[str, int] = {}
        yield header(_WEIGHTS)
        for name, lines in self._lines.items():
            one, twin = held.get(name, _NOTHING), held.get(twins.get(name, ""), _NOTHING)
            unique = one.unique + twin.unique
            families[lines.family] = families.get(lines.family, 0) + unique
            yield lines.weights % (one.logical, one.unique, one.shared)
        yield header(_FAMILY)
        for family, nbytes in families.items():
            yield f"{series(_FAMILY.name, {'family': family})} {nbytes}\n"

    def _states(self, models: Iterable[ModelRecord]) -> Iterable[str]:
        yield header(_STATE)
        for model in models:
            values = tuple(int(model.state is state) for state in ModelState)
            yield self._lines[model.name].states % values

    def _load(self, snapshot: Snapshot | None, twins: Mapping[str, str]) -> Iterable[str]:
        loads = {} if snapshot is None else snapshot.load
        running, waiting = [header(_RUNNING)], [header(_WAITING)]
        for name, lines in self._lines.items():
            one, twin = loads.get(name, _IDLE), loads.get(twins.get(name, ""), _IDLE)
            running.append(lines.running % (one.running + twin.running))
            waiting.append(lines.waiting % (one.waiting + twin.waiting))
        return (*running, *waiting)


def _device(snapshot: Snapshot | None) -> Iterable[str]:
    yield header(_DEVICE)
    if snapshot is None:
        return
    states = {
        "weights": snapshot.device_weight_bytes,
        "kv": snapshot.device_kv_bytes,
        "free": snapshot.device_free_bytes,
        # Set aside for other processes, or for what is being loaded.
        "other": snapshot.reserved_bytes + snapshot.arriving_bytes,
    }
    for state, nbytes in states.items():
        labels = {"device": snapshot.device, "state": state}
        yield f"{series(_DEVICE.name, labels)} {nbytes}\n"
