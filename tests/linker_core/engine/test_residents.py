"""Any order of what can happen to resident models keeps bytes, references and answers right."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from linker_core.engine.messages import (
    CancelLoad,
    LoadFailed,
    LoadModel,
    ModelLoaded,
    ModelUnloaded,
    Snapshot,
    Submit,
    UnloadFailed,
    UnloadModel,
)
from linker_core.engine.snapshot import take_snapshot
from linker_core.residency import own_memory, reading
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.engine.driving import SMALL, Driver
from tests.linker_core.engine.kinfolk import PARAMS, PROMPT, VARIANTS, Answer, Kinfolk, make_kinfolk
from tests.linker_core.engine.test_loading import slow_down

NAMES = ("a", "b", "c", "d", "e")
BRIEF = replace(PARAMS, max_tokens=2)
BUDGET_BYTES = 2_500_000
_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def kinfolk(tmp_path_factory: pytest.TempPathFactory) -> Kinfolk:
    return make_kinfolk(tmp_path_factory.mktemp("kinfolk"))


@dataclass
class Faults:
    """Fails the n-th of some calls, counted together."""

    at: int
    num_calls: int = 0

    def count(self) -> bool:
        self.num_calls += 1
        return self.num_calls == self.at

    @property
    def hit(self) -> bool:
        return self.num_calls >= self.at


@contextmanager
def failing(at: int) -> Iterator[Faults]:
    """Memory that is used up, or a disk that fails, at the n-th allocation or read."""
    faults = Faults(at)
    empty, mapped, read_into = torch.empty, reading.map_host_memory, Checkpoint.read_into

    def no_memory(*size: object, **options: object) -> torch.Tensor:
        if faults.count():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*size, **options)  # type: ignore[call-overload, no-any-return]

    def no_pages(nbytes: int) -> mmap.mmap:
        if faults.count():
            raise OSError(12, "Cannot allocate memory")
        return mapped(nbytes)

    def no_disk(self: Checkpoint, name: str, buffer: memoryview, *, offset_bytes: int = 0) -> None:
        if faults.count():
            raise OSError(5, "Input/output error")
        read_into(self, name, buffer, offset_bytes=offset_bytes)

    with (
        mock.patch.object(torch, "empty", no_memory),
        mock.patch.object(reading, "map_host_memory", no_pages),
        mock.patch.object(own_memory, "map_host_memory", no_pages),
        mock.patch.object(Checkpoint, "read_into", no_disk),
    ):
        yield faults


class Residents(RuleBasedStateMachine):
    """Commands of every kind; which models are there is known by what was answered."""

    kinfolk: Kinfolk
    known: dict[str, Answer]  # what each kind answers beside its plain donor

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(replace(SMALL, memory_budget_bytes=BUDGET_BYTES))
        self.kinds: dict[str, str] = {}
        self.heads: dict[str, str] = {}

    # --- what can happen ----------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(("base", *VARIANTS)))
    def found(self, name: str, kind: str) -> None:
        self.load(self.kinfolk.message(kind, model=name))

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(VARIANTS), data=st.data())
    @precondition(lambda self: self.heads)
    def join(self, name: str, kind: str, data: st.DataObject) -> None:
        self.load(self.kinfolk.message(kind, model=name, donor=self.some_head(data)))

    @rule(kind=st.sampled_from(VARIANTS), data=st.data())
    @precondition(lambda self: self.members())
    def replace_plan(self, kind: str, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.members()))
        message = self.kinfolk.message(kind, model=name, donor=self.heads[name])
        self.load(replace(message, replaces=True))

    @rule(data=st.data(), busy=st.booleans())
    @precondition(lambda self: self.kinds)
    def unload(self, data: st.DataObject, *, busy: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.kinds)))
        before = self.told()
        running = self.submit(name, tokens=6) if busy else None
        self.driver.step()
        (ended,) = self.send(UnloadModel(model=name))
        if running is not None:
            assert len(self.driver.tokens(running)) == 6
        if self.dependants(name):
            assert isinstance(ended, UnloadFailed)
            assert self.told().models == before.models
            return
        assert ended == ModelUnloaded(model=name)
        is_last = self.heads[name] == name
        del self.kinds[name], self.heads[name]
        told = self.told()
        given_back = before.models[name].unique
        assert told.device_weight_bytes == before.device_weight_bytes - given_back
        kv_bytes = before.device_kv_bytes - told.device_kv_bytes
        assert bool(kv_bytes) is is_last
        assert told.device_free_bytes == before.device_free_bytes + given_back + kv_bytes

    @rule(data=st.data(), busy=st.booleans())
    @precondition(lambda self: self.members())
    def rehome(self, data: st.DataObject, *, busy: bool) -> None:
        heir = data.draw(st.sampled_from(self.members()))
        head = self.heads[heir]
        weights = self.weights(heir)
        everyone = sorted(self.kinds)
        running = {name: self.submit(name, tokens=4) for name in everyone} if busy else {}
        self.driver.step()
        self.driver.engine.handle(UnloadModel(model=head, heir=heir))
        assert heir in self.driver.engine.residents.families
        self.driver.run()
        assert all(len(self.driver.tokens(request)) == 4 for request in running.values())
        self.heads = {n: heir if h == head else h for n, h in self.heads.items() if n != head}
        del self.kinds[head]
        assert self.weights(heir) == weights

    @rule(
        name=st.sampled_from(NAMES),
        kind=st.sampled_from(("base", *VARIANTS)),
        at=st.integers(1, 200),
        data=st.data(),
    )
    def load_that_fails(self, name: str, kind: str, at: int, data: st.DataObject) -> None:
        donor = None if kind == "base" else data.draw(st.sampled_from([None, *sorted(self.some())]))
        replaces = name in self.members()
        if replaces:
            kind, donor = ("first" if kind == "base" else kind), self.heads[name]
        message = replace(self.kinfolk.message(kind, model=name, donor=donor), replaces=replaces)
        before = self.told()
        with failing(at) as faults:
            answer = self.driver.load(message)
        if isinstance(answer, LoadFailed):
            self.refused(message, answer, faulty=faults.hit)
            assert self.told() == before
        else:
            assert not faults.hit
            self.arrived(message)

    @rule(
        name=st.sampled_from(NAMES),
        kind=st.sampled_from(VARIANTS),
        steps=st.integers(0, 80),
        data=st.data(),
    )
    def load_that_is_cancelled(self, name: str, kind: str, steps: int, data: st.DataObject) -> None:
        donor = data.draw(st.sampled_from([None, *sorted(self.some())]))
        message = self.kinfolk.message(kind, model=name, donor=donor)
        before = self.told()
        clock = self.driver.engine._loading._clock
        slow_down(self.driver)
        self.driver.engine.handle(message)
        start = len(self.driver.events)
        for _ in range(steps):
            self.driver.step()
        self.driver.engine.handle(CancelLoad(model=name))
        self.driver.run()
        self.driver.engine._loading._clock = clock
        (answer,) = (
            e for e in self.driver.events[start:] if isinstance(e, ModelLoaded | LoadFailed)
        )
        if isinstance(answer, ModelLoaded):
            self.arrived(message)
        else:
            assert self.told() == before

    # --- what always holds --------------------------------------------------------------------

    @invariant()
    def bytes_are_the_union_of_storages(self) -> None:
        residents = self.driver.engine.residents
        residents.check_integrity()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.nbytes
            for variant in residents.pool.models()
            for entry in variant.tensors.values()
            for tensor in (*entry.tensors, *entry.base.tensors)
            if tensor.nbytes
        }
        ledger = residents.pool.ledger
        assert sum(storages.values()) == ledger.resident_bytes()
        assert sum(map(ledger.unique_bytes, ledger.models())) == ledger.resident_bytes()
        assert residents.pool.budget.free_bytes() >= 0
        assert set(residents.served) == set(self.kinds)
        assert set(residents.families) == set(self.heads.values())

    @invariant()
    def answers_are_what_they_were(self) -> None:
        running = {name: self.submit(name, tokens=2) for name in self.kinds}
        self.driver.run()
        for name, request in running.items():
            said = [(token.token_id, token.logprob) for token in self.driver.outputs[request]]
            assert said == self.known[self.kinds[name]], (name, self.kinds[name])

    # --- by what means ------------------------------------------------------------------------

    def load(self, message: LoadModel) -> None:
        before = self.told()
        answer = self.driver.load(message)
        if isinstance(answer, ModelLoaded):
            self.arrived(message)
        else:
            self.refused(message, answer, faulty=False)
            assert self.told() == before

    def arrived(self, message: LoadModel) -> None:
        assert message.replaces == (message.model in self.kinds)
        (kind,) = (kind for kind, plan in self.kinfolk.plans.items() if plan is message.plan)
        self.kinds[message.model] = kind
        self.heads[message.model] = message.donor or message.model
        assert self.told().models.keys() == self.kinds.keys()

    def refused(self, message: LoadModel, answer: LoadFailed, *, faulty: bool) -> None:
        """A refusal has a reason: the name is taken, there is no room, or something failed."""
        taken = message.model in self.kinds and not message.replaces
        reasons = {"conflict"} if taken else {"insufficient_capacity"}
        assert faulty or answer.error["code"] in reasons, answer.error

    def told(self) -> Snapshot:
        """What the engine says of bytes."""
        engine = self.driver.engine
        told = take_snapshot(engine.residents, (), engine.device)
        return replace(told, prefix_queries=0, prefix_hits=0)

    def send(self, command: UnloadModel) -> list[ModelUnloaded | UnloadFailed]:
        start = len(self.driver.events)
        self.driver.engine.handle(command)
        self.driver.run()
        ends = self.driver.events[start:]
        return [event for event in ends if isinstance(event, ModelUnloaded | UnloadFailed)]

    def submit(self, model: str, *, tokens: int) -> str:
        """A request that finds nothing in the prefix cache."""
        request_id = f"request {next(_NUMBERS)}"
        self.driver.engine.handle(
            Submit(
                request_id=request_id,
                model=model,
                prompt_ids=tuple(PROMPT),
                sampling=replace(BRIEF, max_tokens=tokens),
                cache_salt=request_id,
            )
        )
        return request_id

    def weights(self, name: str) -> dict[str, tuple[int, ...]]:
        """Where a model's tensors lie, those that it leans on included."""
        tensors = self.driver.engine.residents.pool.get(name).tensors
        return {
            key: tuple(tensor.data_ptr() for tensor in (*entry.tensors, *entry.base.tensors))
            for key, entry in tensors.items()
        }

    def some(self) -> set[str]:
        return set(self.heads.values())

    def some_head(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.some())))

    def members(self) -> list[str]:
        return sorted(name for name, head in self.heads.items() if name != head)

    def dependants(self, name: str) -> list[str]:
        return [other for other, head in self.heads.items() if head == name != other]


def test_residents_survive_any_order_of_commands(
    kinfolk: Kinfolk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that tensors as small as these lie together as larger models' do.
    monkeypatch.setattr(own_memory, "HUGE_PAGE_BYTES", 1 << 14)
    brief: dict[str, Answer] = {}
    for kind in ("base", *VARIANTS):
        brief[kind] = kinfolk.alone(kind, PROMPT)[:2]

    class Machine(Residents):
        known = brief

    Machine.kinfolk = kinfolk
    Machine.TestCase.settings = settings(
        max_examples=20,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    Machine.TestCase().runTest()
