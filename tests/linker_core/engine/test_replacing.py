"""Another plan for a model that serves: no answer mixes the two, and nothing is left behind."""

from __future__ import annotations

import gc
import itertools
import os
import random
import shutil
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from linker_core.config import EngineConfig
from linker_core.engine.engine import BUSY_SLICE_S
from linker_core.engine.messages import (
    Abort,
    CancelLoad,
    LoadFailed,
    LoadModel,
    ModelLoaded,
    ModelUnloaded,
    SamplingParams,
    Submit,
    UnloadFailed,
    UnloadModel,
)
from linker_core.engine.snapshot import take_snapshot
from linker_core.sharing.rungs import AnyRung, Rung, parse_rung
from tests.linker_core.engine.driving import SMALL, Driver, load_message
from tests.linker_core.engine.serving import PROMPT
from tests.linker_core.residency.deltas import donor_plan, matrices, write_planned
from tests.tiny import make_checkpoint, make_variant

PARAMS = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0)
PLANS = ("coarse", "fine", "mixed")
Answer = list[tuple[int, float | None]]


@dataclass
class Models:
    """A donor and three plans of one variant, with what each answers alone."""

    folder: Path
    known: dict[tuple[str, tuple[int, ...]], Answer] = field(default_factory=dict)

    def message(self, plan: str, *, model: str = "chat", replaces: bool = False) -> LoadModel:
        return load_message(model, self.folder / plan, donor="base", replaces=replaces)

    def base(self) -> LoadModel:
        path = self.folder / "base"
        return load_message("base", path, plan=donor_plan(path))

    def driver(self, *plans: str, config: EngineConfig = SMALL) -> Driver:
        """An engine with the donor and the first of the plans as `chat`, the next replacing it."""
        driver = Driver(config)
        assert isinstance(driver.load(self.base()), ModelLoaded)
        for number, plan in enumerate(plans):
            answer = driver.load(self.message(plan, replaces=number > 0))
            assert isinstance(answer, ModelLoaded)
        return driver

    def alone(self, plan: str, prompt: list[int]) -> Answer:
        """What `chat` answers under a plan when nothing else runs."""
        key = (plan, tuple(prompt))
        if key not in self.known:
            driver = self.driver(plan)
            self.known[key] = answer(driver, submit(driver, prompt))
        return self.known[key]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    base = make_checkpoint(folder / "base", tie=False)
    variant = make_variant(folder / "variant", base, scale=0.4)
    names = matrices(base)
    cycle = (Rung.OWN, Rung.ALIAS, parse_rung("rank3:8"))
    rungs: dict[str, dict[str, AnyRung]] = {
        "coarse": dict.fromkeys(names, parse_rung("signs:64")),
        "fine": dict.fromkeys(names, parse_rung("int4:32")),
        "mixed": {name: cycle[number % 3] for number, name in enumerate(names)},
    }
    for plan, chosen in rungs.items():
        write_planned(base, variant, folder / plan, chosen)
    return Models(folder)


_NUMBERS = itertools.count()


def submit(driver: Driver, prompt: list[int], *, params: SamplingParams = PARAMS) -> str:
    request_id = f"request {next(_NUMBERS)}"
    driver.engine.handle(
        Submit(request_id=request_id, model="chat", prompt_ids=tuple(prompt), sampling=params)
    )
    return request_id


def answer(driver: Driver, request_id: str) -> Answer:
    driver.run()
    assert request_id not in driver.errors, driver.errors
    return said(driver, request_id)


def said(driver: Driver, request_id: str) -> Answer:
    return [(token.token_id, token.logprob) for token in driver.outputs[request_id]]


def slow_down(driver: Driver, *, chunks: int = 16) -> None:
    """Lets time go by with looks at the clock alone, so that each slice moves so many chunks."""
    clock = itertools.count()
    driver.engine._loading._clock = lambda: next(clock) * BUSY_SLICE_S / chunks


def load_events(driver: Driver) -> list[object]:
    kinds = (ModelLoaded, LoadFailed, ModelUnloaded, UnloadFailed)
    return [event for event in driver.events if isinstance(event, kinds)]


def step_until_replaced(driver: Driver) -> None:
    before = len([e for e in driver.events if isinstance(e, ModelLoaded)])
    while len([e for e in driver.events if isinstance(e, ModelLoaded)]) == before:
        driver.step()


def leaving(driver: Driver) -> list[str]:
    return [model.stored_as for model in driver.engine.residents.leaving()]


def test_plans_answer_differently(models: Models) -> None:
    assert len({tuple(models.alone(plan, PROMPT)) for plan in PLANS}) == len(PLANS)


def test_running_sequences_end_on_the_old_plan_and_new_ones_begin_on_the_new(
    models: Models,
) -> None:
    driver = models.driver("coarse")
    slow_down(driver)
    prompts = [[*PROMPT, number] for number in range(6)]
    old = [submit(driver, prompt) for prompt in prompts[:2]]
    driver.step()
    driver.engine.handle(models.message("fine", replaces=True))
    driver.step()
    old += [submit(driver, prompt) for prompt in prompts[2:3]]  # it is being loaded
    step_until_replaced(driver)
    assert any(len(driver.outputs[request_id]) < PARAMS.max_tokens for request_id in old)
    new = [submit(driver, prompt) for prompt in prompts[3:]]
    driver.run()
    got = [said(driver, request_id) for request_id in (*old, *new)]
    assert got == [
        models.alone("coarse" if number < 3 else "fine", prompt)
        for number, prompt in enumerate(prompts)
    ]
    assert leaving(driver) == []
    assert [type(event) for event in load_events(driver)] == [ModelLoaded] * 3


def test_every_pair_of_plans_can_replace_each_other(models: Models) -> None:
    for plans in itertools.permutations(PLANS, 2):
        driver = models.driver(*plans)
        assert answer(driver, submit(driver, PROMPT)) == models.alone(plans[1], PROMPT)


def test_nothing_of_the_old_plan_is_found_in_the_cache(models: Models) -> None:
    driver = models.driver("coarse")
    prompt = [*PROMPT, *PROMPT, *PROMPT]
    answer(driver, submit(driver, prompt))
    driver.load(models.message("fine", replaces=True))
    first = submit(driver, prompt)
    assert answer(driver, first) == models.alone("fine", prompt)
    again = submit(driver, prompt)
    assert answer(driver, again) == models.alone("fine", prompt)
    assert [driver.outputs[r][0].num_cached_tokens for r in (first, again)] == [0, 20]


def own_tensors(driver: Driver, model: str) -> list[weakref.ref[torch.Tensor]]:
    """What lies on the device for a model alone."""
    pool = driver.engine.residents.pool
    lent = set(pool.get("base").tensors.values())
    entries = set(pool.get(model).tensors.values()) - lent
    return [weakref.ref(tensor) for entry in entries for tensor in entry.tensors]


def num_alive(tensors: list[weakref.ref[torch.Tensor]]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in tensors)


def test_old_tensors_leave_with_their_last_sequence(models: Models) -> None:
    driver = models.driver("coarse")
    old = own_tensors(driver, "chat")
    running = [submit(driver, [*PROMPT, number]) for number in range(2)]
    driver.engine.handle(models.message("fine", replaces=True))
    step_until_replaced(driver)
    assert len(leaving(driver)) == 1
    assert num_alive(old) == len(old) > 20
    driver.engine.handle(Abort(request_id=running[0]))
    driver.step()
    assert num_alive(old) == len(old)
    driver.engine.handle(Abort(request_id=running[1]))
    driver.step()
    assert num_alive(old) == 0
    assert driver.engine.residents.pool.ledger.models() == ["base", "chat"]
    assert answer(driver, submit(driver, PROMPT)) == models.alone("fine", PROMPT)


def test_bytes_of_both_plans_are_reported_as_long_as_both_are_there(models: Models) -> None:
    driver = models.driver("coarse")
    engine = driver.engine
    sizes = {plan: models.message(plan).plan.unique_bytes for plan in PLANS}
    base = models.base().plan.unique_bytes
    free = engine.residents.pool.budget.free_bytes()
    submit(driver, PROMPT)
    driver.engine.handle(models.message("fine", replaces=True))
    step_until_replaced(driver)
    report = take_snapshot(engine.residents, (), engine.device)
    assert report.models["chat"].unique == sizes["fine"]
    assert report.leaving_bytes == sizes["coarse"]
    assert report.load["chat"].running == 1
    assert report.device_weight_bytes == base + sizes["fine"] + sizes["coarse"]
    assert report.device_free_bytes == free - sizes["fine"]
    driver.run()
    report = driver.snapshot()
    assert report.leaving_bytes == 0
    assert report.device_weight_bytes == base + sizes["fine"]
    assert report.device_free_bytes == free - sizes["fine"] + sizes["coarse"]


def test_preempted_sequences_are_recomputed_on_their_own_plan(models: Models) -> None:
    # 14 pages of 4 tokens for sequences of up to 20: most are preempted.
    driver = models.driver("coarse", config=replace(SMALL, kv_cache_tokens=56))
    prompts = [[*PROMPT, number] for number in range(10)]
    old = [submit(driver, prompt) for prompt in prompts[:5]]
    driver.step()
    driver.engine.handle(models.message("mixed", replaces=True))
    step_until_replaced(driver)
    scheduler = driver.engine.residents.families["base"].scheduler
    preempted = scheduler.num_preemptions
    new = [submit(driver, prompt) for prompt in prompts[5:]]
    driver.run()
    assert scheduler.num_preemptions > preempted
    for number, request_id in enumerate((*old, *new)):
        plan = "coarse" if number < 5 else "mixed"
        assert said(driver, request_id) == models.alone(plan, prompts[number])


def refused(driver: Driver, message: LoadModel) -> str | None:
    loaded = driver.load(message)
    assert isinstance(loaded, LoadFailed)
    return loaded.error["code"]


def test_what_cannot_be_replaced_is_refused_and_serves_on(models: Models) -> None:
    driver = models.driver("coarse")
    before = driver.snapshot()
    assert refused(driver, models.message("fine")) == "conflict"
    assert refused(driver, models.message("fine", model="new", replaces=True)) == "model_not_found"
    assert refused(driver, models.message("fine", model="base", replaces=True)) == "conflict"
    assert refused(driver, replace(models.base(), model="chat", replaces=True)) == "conflict"
    stranger = replace(models.message("fine", replaces=True), donor="nobody")
    assert refused(driver, stranger) == "model_not_found"
    assert driver.snapshot() == before
    assert answer(driver, submit(driver, PROMPT)) == models.alone("coarse", PROMPT)


def test_replacement_that_does_not_fit_beside_the_old_plan_is_refused(models: Models) -> None:
    sizes = {plan: models.message(plan).plan.unique_bytes for plan in PLANS}
    config = replace(SMALL, memory_budget_bytes=10**9)
    driver = models.driver("coarse", config=config)
    room = driver.engine.residents.pool.budget.free_bytes()
    driver.engine.residents.pool.budget.reserve("another", room - sizes["fine"] + 1)
    assert refused(driver, models.message("fine", replaces=True)) == "insufficient_capacity"
    assert driver.engine.residents.pool.budget.free_bytes() == sizes["fine"] - 1
    assert answer(driver, submit(driver, PROMPT)) == models.alone("coarse", PROMPT)


def test_replacement_that_cannot_be_bound_leaves_the_old_plan(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = models.driver("coarse")
    running = submit(driver, PROMPT)
    driver.step()
    pool = driver.engine.residents.pool
    free = pool.budget.free_bytes()
    last_leaf = driver.engine.residents.families["base"].runner.model.leaves[-1]

    def refuse(_slot: int, _tensors: object) -> None:
        raise KeyError("lm_head.weight")

    with monkeypatch.context() as patched:
        patched.setattr(last_leaf, "bind", refuse)
        assert refused(driver, models.message("fine", replaces=True)) == "engine_failure"
    assert pool.budget.free_bytes() == free
    assert pool.ledger.models() == ["base", "chat"]
    assert said(driver, running) == models.alone("coarse", PROMPT)
    assert answer(driver, submit(driver, PROMPT)) == models.alone("coarse", PROMPT)


def test_replacement_over_files_that_change_is_refused(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models.folder / "fine", tmp_path / "fine")
    message = load_message("chat", tmp_path / "fine", donor="base", replaces=True)
    driver = models.driver("coarse")
    os.utime(tmp_path / "fine" / "delta.safetensors", ns=(1, 1))
    assert refused(driver, message) == "bad_checkpoint"
    assert answer(driver, submit(driver, PROMPT)) == models.alone("coarse", PROMPT)


def test_replacement_that_is_cancelled_half_way_leaves_the_old_plan(models: Models) -> None:
    driver = models.driver("coarse")
    free = driver.engine.residents.pool.budget.free_bytes()
    slow_down(driver)
    running = submit(driver, PROMPT)
    for plan in ("fine", "mixed"):  # one is being loaded, one waits
        driver.engine.handle(models.message(plan, replaces=True))
    driver.step()
    driver.step()
    driver.engine.handle(CancelLoad(model="chat"))
    driver.engine.handle(CancelLoad(model="nobody"))
    assert answer(driver, running) == models.alone("coarse", PROMPT)
    cancelled = [event for event in driver.events if isinstance(event, LoadFailed)]
    assert [(event.model, event.error["code"]) for event in cancelled] == [
        ("chat", "not_ready")
    ] * 2
    assert driver.engine.residents.pool.budget.free_bytes() == free
    assert answer(driver, submit(driver, PROMPT)) == models.alone("coarse", PROMPT)


def test_unload_meanwhile_cancels_the_replacement_and_waits_for_the_old_plan(
    models: Models,
) -> None:
    driver = models.driver("coarse")
    slow_down(driver)
    running = submit(driver, PROMPT)
    driver.engine.handle(models.message("fine", replaces=True))
    driver.step()
    driver.step()
    driver.engine.handle(UnloadModel(model="chat"))
    assert answer(driver, running) == models.alone("coarse", PROMPT)
    assert [type(event) for event in load_events(driver)[2:]] == [LoadFailed, ModelUnloaded]
    assert driver.engine.residents.pool.ledger.models() == ["base"]


def test_donor_of_a_plan_and_of_its_replacement_names_the_model_once(models: Models) -> None:
    driver = models.driver("coarse")
    driver.engine.handle(models.message("fine", replaces=True))
    driver.engine.handle(UnloadModel(model="base"))
    driver.run()
    (failed,) = [event for event in driver.events if isinstance(event, UnloadFailed)]
    assert "is the donor of chat." in (failed.error["message"] or "")


def test_unload_after_a_replacement_waits_for_the_sequences_of_both_plans(models: Models) -> None:
    driver = models.driver("coarse")
    old = submit(driver, PROMPT)
    driver.step()
    driver.engine.handle(models.message("fine", replaces=True))
    step_until_replaced(driver)
    new = submit(driver, PROMPT)
    driver.step()
    driver.engine.handle(UnloadModel(model="chat"))
    driver.engine.handle(UnloadModel(model="base"))
    late = submit(driver, PROMPT)
    driver.engine.handle(models.message("mixed", replaces=True))
    driver.engine.handle(Abort(request_id=new))
    driver.step()
    # The newer has nothing to do any more, and the name is not free yet.
    assert len(leaving(driver)) == 1
    assert not any(isinstance(event, ModelUnloaded) for event in driver.events)
    assert answer(driver, old) == models.alone("coarse", PROMPT)
    assert driver.errors[late]["code"] == "model_not_found"
    events = load_events(driver)[3:]
    assert [type(event) for event in events] == [UnloadFailed, ModelUnloaded, LoadFailed]
    assert isinstance(events[0], UnloadFailed)
    assert "donor of chat." in (events[0].error["message"] or "")
    assert driver.engine.residents.pool.ledger.models() == ["base"]
    driver.engine.handle(UnloadModel(model="base"))
    driver.run()
    assert driver.engine.residents.pool.ledger.resident_bytes() == 0


def test_a_second_replacement_leaves_three_plans_side_by_side(models: Models) -> None:
    driver = models.driver("coarse")
    running: list[str] = []
    for plan in PLANS:
        if running:
            driver.engine.handle(models.message(plan, replaces=True))
            step_until_replaced(driver)
        running.append(submit(driver, [*PROMPT, len(running)]))
        driver.step()
    assert len(leaving(driver)) == 2
    driver.run()
    for number, (plan, request_id) in enumerate(zip(PLANS, running, strict=True)):
        assert said(driver, request_id) == models.alone(plan, [*PROMPT, number])
    assert driver.engine.residents.pool.ledger.models() == ["base", "chat"]


def test_sequence_that_waits_for_its_grammar_stays_on_the_old_plan(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = models.driver("coarse")
    grammar = replace(PARAMS, grammar="start: /[a-z ]{4,9}/", stop_token_ids=frozenset({2}))
    alone = models.driver("coarse")
    want = answer(alone, submit(alone, PROMPT, params=grammar))
    builds = driver.engine._grammars
    with monkeypatch.context() as patched:
        patched.setattr(builds, "finished", lambda _timeout_s: [])  # it takes its time
        waiting = submit(driver, PROMPT, params=grammar)
        driver.engine.handle(models.message("fine", replaces=True))
        step_until_replaced(driver)
        assert len(leaving(driver)) == 1
    assert answer(driver, waiting) == want
    assert leaving(driver) == []


@dataclass
class Traffic:
    """Random commands about one model, and what is to come of its requests."""

    models: Models
    driver: Driver
    chance: random.Random
    plan: str | None = None  # that takes requests now
    asked: list[str] = field(default_factory=list)  # plans to be loaded, in their order
    sent: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    num_seen: int = 0

    def act(self) -> None:
        draw = self.chance.random()
        if draw < 0.45:
            if self.plan is not None:
                prompt = [*PROMPT[: self.chance.randrange(1, 7)], self.chance.randrange(4)]
                self.sent[submit(self.driver, prompt)] = (self.plan, prompt)
        elif draw < 0.7 and len(self.asked) < 2:
            plan = self.chance.choice(PLANS)
            replaces = self.plan is not None or bool(self.asked)
            self.asked.append(plan)
            self.driver.engine.handle(self.models.message(plan, replaces=replaces))
        elif draw < 0.8 and self.sent:
            request_id = self.chance.choice(list(self.sent))
            self.aborted.add(request_id)
            self.driver.engine.handle(Abort(request_id=request_id))
        elif draw < 0.85:
            self.driver.engine.handle(CancelLoad(model="chat"))
        elif draw < 0.9:
            self.driver.engine.handle(UnloadModel(model="chat"))
            self.plan = None
        for _ in range(self.chance.randrange(4)):
            self.step()

    def step(self) -> None:
        self.driver.step()
        for event in load_events(self.driver)[self.num_seen :]:
            self.num_seen += 1
            if isinstance(event, ModelLoaded) and event.model == "chat":
                self.plan = self.asked.pop(0)
            elif isinstance(event, LoadFailed):
                self.asked.pop(0)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_commands_keeps_every_answer_to_one_plan(models: Models, seed: int) -> None:
    driver = models.driver(config=replace(SMALL, kv_cache_tokens=120))
    slow_down(driver)
    traffic = Traffic(models, driver, random.Random(seed), num_seen=len(load_events(driver)))
    for _ in range(120):
        traffic.act()
    while driver.engine.has_work:
        traffic.step()
    driver.run()
    num_whole = 0
    for request_id, (plan, prompt) in traffic.sent.items():
        got = said(driver, request_id)
        want = models.alone(plan, prompt)
        assert got == want[: len(got)]
        assert len(got) == len(want) or request_id in traffic.aborted
        num_whole += len(got) == len(want)
    assert num_whole > 5
    assert set(driver.engine.residents.pool.ledger.models()) <= {"base", "chat"}
    assert leaving(driver) == []
