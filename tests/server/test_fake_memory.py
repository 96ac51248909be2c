"""The fake engine counts what the engine counts, and refuses what it refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from linker_core.engine.messages import LoadFailed, UnloadFailed, UnloadModel
from linker_core.errors import ConflictError, LinkerError
from tests.linker_core.engine.driving import SMALL, Driver
from tests.linker_core.engine.kinfolk import VARIANTS, Kinfolk, make_kinfolk
from tests.server.fake_memory import FakeMemory

BUDGET_BYTES = 900_000  # for about four of them


@pytest.fixture(scope="module")
def kinfolk(tmp_path_factory: pytest.TempPathFactory) -> Kinfolk:
    return make_kinfolk(tmp_path_factory.mktemp("kinfolk"), tie=True)


def code_of(work: Callable[[], object]) -> str | None:
    """What is refused, if anything."""
    try:
        work()
    except LinkerError as error:
        return error.code
    return None


def load(kinfolk: Kinfolk, driver: Driver, fake: FakeMemory, kind: str, donor: str | None) -> None:
    message = kinfolk.message(kind, donor=donor)
    answer = driver.load(message)
    refused = answer.error["code"] if isinstance(answer, LoadFailed) else None
    assert code_of(lambda: fake.load(message, leaving=set())) == refused


def unload(driver: Driver, fake: FakeMemory, model: str, heir: str | None) -> None:
    before = len(driver.events)
    driver.engine.handle(UnloadModel(model=model, heir=heir))
    driver.run()
    failed = [event for event in driver.events[before:] if isinstance(event, UnloadFailed)]

    def leave() -> None:
        if model in fake.models:
            if heir is not None:
                fake.rehome(model, heir, leaving=set())
            if users := fake.dependants(model):
                raise ConflictError(f"{model} is the donor of {', '.join(users)}.")
            fake.unload(model)

    code = code_of(leave)
    assert [event.error["code"] for event in failed] == ([] if code is None else [code])


@pytest.mark.parametrize("seed", range(8))
def test_fake_memory_follows_the_engine(kinfolk: Kinfolk, seed: int) -> None:
    chance = random.Random(seed)
    config = replace(SMALL, memory_budget_bytes=BUDGET_BYTES)
    driver, fake = Driver(config), FakeMemory(config)
    load(kinfolk, driver, fake, chance.choice(("base", *VARIANTS)), None)
    for _ in range(40):
        names = [*fake.models, chance.choice(VARIANTS)]
        if chance.random() < 0.6:
            donor = chance.choice([None, *names]) if chance.random() < 0.3 else names[0]
            heads = [name for name in fake.models if fake.is_head(name)]
            load(kinfolk, driver, fake, chance.choice(VARIANTS), chance.choice([donor, *heads]))
        else:
            unload(driver, fake, chance.choice(names), chance.choice([None, *names]))
        told = driver.snapshot()
        assert {name: fake.bytes_of(name) for name in fake.models} == told.models
        assert fake.weight_bytes() == told.device_weight_bytes
        assert fake.kv_bytes() == told.device_kv_bytes
        assert fake.free_bytes() == told.device_free_bytes
