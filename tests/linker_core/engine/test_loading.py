"""Models coming and going while others are there: refusals leave everything as it was."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from linker_core.engine.messages import (
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    ModelUnloaded,
    UnloadFailed,
    UnloadModel,
)
from linker_core.residency.stored import StoredResidual
from tests.linker_core.engine.driving import GREEDY, SMALL, Driver, load_message
from tests.linker_core.engine.families import (
    reference_greedy,
    reference_logprobs,
    reference_model,
)
from tests.linker_core.engine.serving import PROMPT, Served, first_block
from tests.linker_core.residency.deltas import donor_plan, write_random_delta
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base", tie=False)


@pytest.fixture
def driver(base: Path) -> Driver:
    made = Driver()
    assert isinstance(made.load(load_message("base", base)), ModelLoaded)
    return made


def slow_down(driver: Driver) -> None:
    """Every look at the clock is a second later, so that each slice moves one chunk only."""
    clock = itertools.count()
    driver.engine._loading._clock = lambda: float(next(clock))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_delta_folder_is_served_as_its_dequantised_model(
    tmp_path: Path, architecture: str, tie: bool
) -> None:
    donor = make_checkpoint(tmp_path / "donor", architecture=architecture, tie=tie)
    path = make_variant(tmp_path / "v", donor, scale=0.3, added_tokens=("<a>", "<b>"))
    chance = random.Random(f"{architecture} {tie}")
    plan = write_random_delta(chance, donor, path, tmp_path / "delta")
    driver = Driver()
    driver.load(load_message("base", donor, plan=donor_plan(donor)))
    loaded = driver.load(load_message("chat", tmp_path / "delta", donor="base"))
    assert isinstance(loaded, ModelLoaded)
    assert loaded.bytes.unique == plan.unique_bytes
    stored = driver.engine.residents.pool.get("chat").tensors
    assert any(isinstance(entry, StoredResidual) for entry in stored.values())
    model, prompt = reference_model(path, stored=stored), [513, *PROMPT, 512]
    request_id = driver.submit("chat", prompt, replace(GREEDY, logprobs=0))
    beside = driver.submit("base", PROMPT)
    driver.run()
    want = reference_greedy(model, prompt, GREEDY.max_tokens)
    assert driver.tokens(request_id) == want
    got = [token.logprob for token in driver.outputs[request_id]]
    assert got == pytest.approx(reference_logprobs(model, prompt, want), abs=1e-4)
    alone = reference_greedy(reference_model(donor), PROMPT, GREEDY.max_tokens)
    assert driver.tokens(beside) == alone


def failure(driver: Driver) -> LoadFailed:
    return [event for event in driver.events if isinstance(event, LoadFailed)][-1]


@pytest.mark.parametrize("shape", [{"architecture": "llama"}, {"hidden": 64}, {"layers": 3}])
def test_load_of_another_family_is_refused_and_harms_nobody(
    driver: Driver, base: Path, tmp_path: Path, shape: dict[str, object]
) -> None:
    stranger = make_checkpoint(tmp_path / "stranger", **shape)  # type: ignore[arg-type]
    before = driver.snapshot().models
    answer = driver.load(load_message("stranger", stranger, donor="base"))
    assert isinstance(answer, LoadFailed)
    assert answer.error["code"] == "bad_checkpoint"
    assert driver.snapshot().models == before
    want = reference_greedy(reference_model(base), PROMPT, GREEDY.max_tokens)
    assert driver.generate("base", PROMPT) == want
    # The name is still free.
    variant = make_variant(tmp_path / "variant", base, scale=0.2)
    assert isinstance(driver.load(load_message("stranger", variant, donor="base")), ModelLoaded)


def test_load_with_another_config_than_validated_is_refused(
    driver: Driver, base: Path, tmp_path: Path
) -> None:
    path = make_variant(tmp_path / "variant", base, scale=0.2)
    message = load_message("variant", path, donor="base")
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(record | {"eos_token_id": 5}))
    answer = driver.load(message)
    assert isinstance(answer, LoadFailed)
    assert "changed since validation" in (answer.error["message"] or "")


def test_load_of_files_rewritten_while_they_are_read_is_refused(
    driver: Driver, base: Path, tmp_path: Path
) -> None:
    path = make_variant(tmp_path / "variant", base, scale=0.2)
    before = driver.snapshot().models
    slow_down(driver)
    driver.engine.handle(load_message("variant", path, donor="base"))
    driver.step()
    file = path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-100, 2)
        opened.write(bytes(100))
    driver.run()
    assert failure(driver).error["code"] == "bad_checkpoint"
    assert driver.snapshot().models == before


def test_load_that_cannot_be_bound_leaves_nothing(
    driver: Driver, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_variant(tmp_path / "variant", base, scale=0.2)
    family = driver.engine.residents.families["base"]
    last_leaf = family.runner.model.leaves[-1]
    free = driver.engine.residents.pool.budget.free_bytes()

    def refuse(_slot: int, _tensors: object) -> None:
        raise KeyError("lm_head.weight")

    with monkeypatch.context() as patched:
        patched.setattr(last_leaf, "bind", refuse)
        answer = driver.load(load_message("variant", path, donor="base"))
    assert isinstance(answer, LoadFailed)
    assert driver.engine.residents.pool.budget.free_bytes() == free
    assert all(len(leaf.stored) == 1 for leaf in family.runner.model.leaves)
    assert isinstance(driver.load(load_message("variant", path, donor="base")), ModelLoaded)


def test_load_under_a_name_that_is_leaving_waits_for_it(
    driver: Driver, base: Path, tmp_path: Path
) -> None:
    paths = [make_variant(tmp_path / f"v{n}", base, scale=0.4, seed=n) for n in (1, 2)]
    assert isinstance(driver.load(load_message("chat", paths[0], donor="base")), ModelLoaded)
    old = driver.submit("chat", PROMPT, replace(GREEDY, max_tokens=8))
    driver.step()
    driver.engine.handle(UnloadModel(model="chat"))
    assert isinstance(driver.load(load_message("chat", paths[1], donor="base")), ModelLoaded)
    assert driver.tokens(old) == reference_greedy(reference_model(paths[0]), PROMPT, 8)
    assert driver.generate("chat", PROMPT, replace(GREEDY, max_tokens=8)) == reference_greedy(
        reference_model(paths[1]), PROMPT, 8
    )


def test_unload_of_a_donor_that_somebody_waits_for_is_refused(
    driver: Driver, base: Path, tmp_path: Path
) -> None:
    path = make_variant(tmp_path / "variant", base, scale=0.2)
    slow_down(driver)
    driver.engine.handle(load_message("variant", path, donor="base"))
    driver.step()
    driver.engine.handle(UnloadModel(model="base"))
    driver.run()
    assert {served.name for served in driver.engine.residents.served.values()} == {
        "base",
        "variant",
    }


def test_load_over_a_donor_that_is_leaving_is_refused(
    driver: Driver, base: Path, tmp_path: Path
) -> None:
    message: LoadModel = load_message(
        "variant", make_variant(tmp_path / "variant", base, scale=0.2), donor="base"
    )
    driver.submit("base", PROMPT)
    driver.step()
    driver.engine.handle(UnloadModel(model="base"))
    driver.engine.handle(message)
    driver.run()
    assert failure(driver).model == "variant"
    assert failure(driver).error["code"] == "model_not_found"
    assert driver.engine.residents.families == {}


def test_engine_load_reports_the_ledgers_bytes(served: Served) -> None:
    snapshot = served.driver.snapshot()
    half = snapshot.models["half"]
    state = load_file(served.paths["half"] / "model.safetensors")
    own = sum(tensor.nbytes for name, tensor in state.items() if not first_block(name))
    assert half.unique == own
    assert half.logical == half.unique + half.shared
    assert snapshot.device_weight_bytes == sum(b.unique for b in snapshot.models.values())
    # 2 layers, 2 heads of 12 numbers, keys and values, 4 bytes, 1024 token slots.
    assert snapshot.device_kv_bytes == 2 * 2 * 12 * 2 * 4 * 1024


@pytest.mark.parametrize(("asked", "given"), [(None, 256), (100, 100), (10_000, 256)])
def test_engine_context_is_the_least_of_model_request_and_cache(
    tmp_path: Path, asked: int | None, given: int
) -> None:
    base = make_checkpoint(tmp_path / "base")
    loaded = Driver().load(load_message("base", base, max_model_len=asked))
    assert isinstance(loaded, ModelLoaded)
    assert loaded.max_model_len == given
    small = Driver(replace(SMALL, kv_cache_tokens=70))
    loaded = small.load(load_message("base", base, max_model_len=asked))
    assert isinstance(loaded, ModelLoaded)
    assert loaded.max_model_len == 68


def refused_load(driver: Driver, message: object) -> str | None:
    answer = driver.load(message)  # type: ignore[arg-type]
    assert isinstance(answer, LoadFailed)
    return answer.error["code"]


def test_engine_load_of_files_changed_since_validation_is_refused(served: Served) -> None:
    message = load_message("late", served.paths["own"], donor="base")
    os.utime(served.paths["own"] / "model.safetensors", ns=(1, 1))
    before = served.driver.snapshot().models
    answer = served.driver.load(message)
    assert isinstance(answer, LoadFailed)
    assert answer.error["code"] == "bad_checkpoint"
    assert "changed since validation" in (answer.error["message"] or "")
    assert served.driver.snapshot().models == before


def test_engine_load_under_a_taken_name_or_an_absent_donor_is_refused(served: Served) -> None:
    driver, path = served.driver, served.paths["half"]
    assert refused_load(driver, load_message("own", path, donor="base")) == "conflict"
    assert refused_load(driver, load_message("new", path, donor="nobody")) == "model_not_found"
    assert refused_load(driver, load_message("new", path, donor="own")) == "conflict"


def test_engine_load_beyond_the_budget_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    driver = Driver(replace(SMALL, memory_budget_bytes=400_000))
    assert refused_load(driver, load_message("base", base)) == "insufficient_capacity"
    assert driver.engine.residents.families == {}
    assert driver.engine.residents.pool.budget.free_bytes() == 400_000


def test_engine_serves_while_a_model_is_loading(served: Served, tmp_path: Path) -> None:
    base = served.paths["base"]
    driver = served.driver
    clock = iter(float(second) for second in range(10_000))
    # Every look at the clock is a second later: each slice moves one chunk only.
    driver.engine._loading._clock = lambda: next(clock)
    late = make_variant(tmp_path / "late", base, scale=0.2, seed=9)
    driver.engine.handle(load_message("late", late, donor="base"))
    request_id = driver.submit("own", PROMPT)
    before = len(driver.events)
    driver.run()
    kinds = [type(event) for event in driver.events[before:]]
    assert kinds.count(LoadProgress) > 5
    assert len(driver.tokens(request_id)) == GREEDY.max_tokens
    want = reference_greedy(reference_model(late), PROMPT, GREEDY.max_tokens)
    assert driver.generate("late", PROMPT) == want


def test_engine_unload_waits_for_running_sequences_and_refuses_new_ones(served: Served) -> None:
    driver = served.driver
    running = driver.submit("own", PROMPT)
    driver.step()
    driver.engine.handle(UnloadModel(model="own"))
    late = driver.submit("own", PROMPT)
    driver.run()
    assert driver.errors[late]["code"] == "model_not_found"
    want = reference_greedy(served.references["own"], PROMPT, GREEDY.max_tokens)
    assert driver.tokens(running) == want
    assert ModelUnloaded(model="own") in driver.events
    assert "own" not in driver.snapshot().models
    again = driver.load(load_message("own", served.paths["own"], donor="base"))
    assert isinstance(again, ModelLoaded)
    assert driver.generate("own", PROMPT) == want


def test_engine_unload_drops_every_reference_to_the_variants_tensors(served: Served) -> None:
    driver = served.driver
    driver.generate("half", PROMPT)
    resident = driver.engine.residents.pool.get("half")
    donor = driver.engine.residents.pool.get("base").tensors
    own = [
        weakref.ref(tensor)
        for name, stored in resident.tensors.items()
        if stored is not donor[name]
        for tensor in stored.tensors
    ]
    assert len(own) > 10
    del resident, donor
    driver.engine.handle(UnloadModel(model="half"))
    driver.run()
    gc.collect()
    assert [ref() for ref in own if ref() is not None] == []


def test_engine_unload_of_a_donor_in_use_is_refused(served: Served) -> None:
    driver = served.driver
    driver.engine.handle(UnloadModel(model="base"))
    driver.run()
    refusal = [event for event in driver.events if isinstance(event, UnloadFailed)][-1]
    assert refusal.model == "base"
    assert refusal.error["code"] == "conflict"
    assert "own" in (refusal.error["message"] or "")
    want = reference_greedy(served.references["base"], PROMPT, GREEDY.max_tokens)
    assert driver.generate("base", PROMPT) == want


def test_engine_unload_of_the_whole_family_frees_everything(served: Served) -> None:
    driver = served.driver
    for name in ("own", "half", "base"):
        driver.engine.handle(UnloadModel(model=name))
        driver.run()
    snapshot = driver.snapshot()
    assert (snapshot.device_weight_bytes, snapshot.device_kv_bytes) == (0, 0)
    assert driver.engine.residents.families == {}


def test_engine_unload_of_a_model_that_is_loading_cancels_it(
    served: Served, tmp_path: Path
) -> None:
    driver = served.driver
    before = driver.engine.residents.pool.ledger.resident_bytes()
    late = make_variant(tmp_path / "late", served.paths["base"], scale=0.2, seed=9)
    clock = iter(float(second) for second in range(10_000))
    driver.engine._loading._clock = lambda: next(clock)
    driver.engine.handle(load_message("late", late, donor="base"))
    driver.step()
    driver.engine.handle(UnloadModel(model="late"))
    driver.run()
    failed = [event for event in driver.events if isinstance(event, LoadFailed)]
    assert [event.model for event in failed] == ["late"]
    assert ModelUnloaded(model="late") in driver.events
    assert driver.engine.residents.pool.ledger.resident_bytes() == before
