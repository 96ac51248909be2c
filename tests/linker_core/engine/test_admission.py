"""What an admission moves, how long it takes inside the engine, and memory set aside for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from linker_core.engine.messages import (
    Command,
    Event,
    LoadFailed,
    ModelLoaded,
    ModelUnloaded,
    Release,
    Reserve,
    Reserved,
    ReserveFailed,
    Snapshot,
    UnloadModel,
)
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_variant
from linker_core.sharing.rungs import Rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.engine.driving import GREEDY, SMALL, Driver, load_message
from tests.linker_core.engine.families import reference_greedy, reference_model
from tests.linker_core.engine.serving import PROMPT
from tests.tiny import make_checkpoint, make_variant

UP = "model.layers.1.mlp.up_proj.weight"


class Watch:
    """A clock that only what is patched moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def costs(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, taking so long."""

        def slow(*args: Any, **settings: Any) -> Any:
            self.now_s += seconds
            return function(*args, **settings)

        return slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base", tie=False)


def exact_plan(donor: Path, variant: Path) -> SharePlan:
    """What is byte-identical; a checkpoint's fingerprint is its folder's name."""
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        fingerprints = Fingerprints(donor.name, variant.name)
        return plan_variant(scan(a, b), a, b, policy=Policy.EXACT, fingerprints=fingerprints)


def test_engine_serves_exact_plans_with_own_rows_side_by_side(tmp_path: Path, base: Path) -> None:
    rows = {EMBED_NAME: (*PROMPT[:2], 9), LM_HEAD_NAME: range(0, 512, 3)}
    paths = {
        "base": base,
        "rows": make_variant(
            tmp_path / "rows", base, scale={UP: 0.4}, rows=rows, added_tokens=("<a>",)
        ),
        "near": make_variant(tmp_path / "near", base, scale={UP: 0.4}, seed=2),
    }
    driver = Driver()
    assert isinstance(driver.load(load_message("base", base)), ModelLoaded)
    for name in ("rows", "near"):
        plan = exact_plan(base, paths[name])
        loaded = driver.load(load_message(name, paths[name], donor="base", plan=plan))
        assert isinstance(loaded, ModelLoaded)
        assert (loaded.bytes.unique, loaded.bytes.logical) == (
            plan.unique_bytes,
            plan.logical_bytes,
        )
        if name == "rows":
            assert plan.own_rows == {EMBED_NAME: 4, LM_HEAD_NAME: 172}
            assert plan.rungs[EMBED_NAME] is plan.rungs[LM_HEAD_NAME] is Rung.ROWS
    prompts = {"base": PROMPT, "rows": [512, *PROMPT], "near": PROMPT}
    mixed = {name: driver.submit(name, prompt) for name, prompt in prompts.items()}
    driver.run()
    for name, prompt in prompts.items():
        want = reference_greedy(reference_model(paths[name]), prompt, GREEDY.max_tokens)
        assert driver.tokens(mixed[name]) == want
        assert driver.generate(name, prompt) == want


def test_engine_load_of_a_plan_with_too_few_own_rows_fails_alone(
    tmp_path: Path, base: Path
) -> None:
    path = make_variant(tmp_path / "rows", base, scale=0.0, rows={EMBED_NAME: (4, 9)})
    plan = replace(exact_plan(base, path), own_rows={EMBED_NAME: 1})
    driver = Driver()
    assert isinstance(driver.load(load_message("base", base)), ModelLoaded)
    answer = driver.load(load_message("rows", path, donor="base", plan=plan))
    assert isinstance(answer, LoadFailed)
    assert answer.error["code"] == "bad_checkpoint"
    assert list(driver.snapshot().models) == ["base"]


def test_load_seconds_part_moving_from_binding_and_leave_out_the_steps(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_variant(tmp_path / "v", base, scale={UP: 0.4, EMBED_NAME: 0.4})
    plan = exact_plan(base, path)
    driver, watch = Driver(), Watch()
    assert isinstance(driver.load(load_message("base", base)), ModelLoaded)
    driver.engine._loading._clock = watch
    family = driver.engine.residents.families["base"]
    monkeypatch.setattr(family, "step", watch.costs(1000.0, family.step))
    monkeypatch.setattr(family.runner, "bind", watch.costs(10.0, family.runner.bind))
    monkeypatch.setattr(family.runner, "forward", watch.costs(0.5, family.runner.forward))
    monkeypatch.setattr(Checkpoint, "open", watch.costs(100.0, Checkpoint.open))
    monkeypatch.setattr(Checkpoint, "read_into", watch.costs(1.0, Checkpoint.read_into))
    request_id = driver.submit("base", PROMPT)
    message = load_message("v", path, donor="base", plan=plan)
    watch.now_s = 0.0
    loaded = driver.load(message)
    assert isinstance(loaded, ModelLoaded)
    assert sum(rung is Rung.OWN for rung in plan.rungs.values()) == 2
    assert (loaded.alias_seconds, loaded.move_seconds) == (110.0, 2.0)
    assert loaded.first_token_seconds == 0.5
    assert watch.now_s > 4000.0  # steps were run between the slices
    assert len(driver.tokens(request_id)) == GREEDY.max_tokens


def test_load_of_a_variant_that_is_the_donor_moves_nothing(tmp_path: Path, base: Path) -> None:
    path = make_variant(tmp_path / "v", base, scale=0.0)
    driver, watch = Driver(), Watch()
    assert isinstance(driver.load(load_message("base", base)), ModelLoaded)
    driver.engine._loading._clock = watch
    family = driver.engine.residents.families["base"]
    family.runner.bind = watch.costs(3.0, family.runner.bind)  # type: ignore[method-assign]
    loaded = driver.load(load_message("v", path, donor="base", plan=exact_plan(base, path)))
    assert isinstance(loaded, ModelLoaded)
    assert (loaded.alias_seconds, loaded.move_seconds) == (3.0, 0.0)
    assert loaded.bytes.unique == 0


def test_reserve_sets_memory_aside_until_its_release(base: Path) -> None:
    driver = Driver(replace(SMALL, memory_budget_bytes=1_000_000))
    driver.engine.handle(Reserve(name="tuner", nbytes=900_000))
    driver.run()
    assert Reserved(name="tuner") in driver.events
    assert driver.snapshot().device_free_bytes == 100_000
    refused = driver.load(load_message("base", base))
    assert isinstance(refused, LoadFailed)
    assert refused.error["code"] == "insufficient_capacity"
    driver.engine.handle(Release(name="tuner"))
    driver.run()
    assert driver.snapshot().device_free_bytes == 1_000_000
    assert isinstance(driver.load(load_message("base", base)), ModelLoaded)


@pytest.mark.parametrize(
    ("name", "nbytes", "code"),
    [("other", 500_001, "insufficient_capacity"), ("tuner", 1, "conflict")],
)
def test_reserve_what_does_not_fit_or_is_taken_fails_and_changes_nothing(
    name: str, nbytes: int, code: str
) -> None:
    driver = Driver(replace(SMALL, memory_budget_bytes=1_000_000))
    driver.engine.handle(Reserve(name="tuner", nbytes=500_000))
    driver.engine.handle(Reserve(name=name, nbytes=nbytes))
    driver.run()
    failed = [event for event in driver.events if isinstance(event, ReserveFailed)]
    assert [(event.name, event.error["code"]) for event in failed] == [(name, code)]
    assert driver.snapshot().device_free_bytes == 500_000


def test_release_of_an_unknown_name_is_harmless() -> None:
    driver = Driver(replace(SMALL, memory_budget_bytes=1_000_000))
    driver.engine.handle(Release(name="nobody"))
    driver.run()
    assert driver.snapshot().device_free_bytes == 1_000_000


@pytest.mark.parametrize("busy", [False, True])
def test_snapshot_of_a_change_is_there_before_the_event_that_ends_a_wait(
    tmp_path: Path, base: Path, *, busy: bool
) -> None:
    variant = make_variant(tmp_path / "v", base, scale=0.3)
    driver = Driver(replace(SMALL, memory_budget_bytes=10**9))
    assert isinstance(driver.load(load_message("base", base)), ModelLoaded)
    pool = driver.engine.residents.pool
    if busy:
        driver.submit("base", PROMPT, replace(GREEDY, max_tokens=100))
        driver.step()
    broken = replace(load_message("broken", variant, donor="base"), identity=())
    waits: tuple[tuple[Command, type[Event]], ...] = (
        (load_message("v", variant, donor="base"), ModelLoaded),
        (broken, LoadFailed),
        (Reserve(name="tuner", nbytes=1000), Reserved),
        (UnloadModel(model="v"), ModelUnloaded),
    )
    for command, end in waits:
        driver.engine.handle(command)
        seen: list[Event] = []
        while not any(isinstance(event, end) for event in seen):
            seen += driver.step()
        index = next(number for number, event in enumerate(seen) if isinstance(event, end))
        told = [event for event in seen[:index] if isinstance(event, Snapshot)][-1]
        assert told.device_free_bytes == pool.budget.free_bytes()
        assert set(told.models) == set(driver.engine.residents.served)
    driver.engine.handle(Release(name="tuner"))
    (told,) = [event for event in driver.step() if isinstance(event, Snapshot)]
    assert told.device_free_bytes == pool.budget.free_bytes()
    assert told.reserved_bytes == 0
