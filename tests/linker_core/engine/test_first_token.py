"""Nothing is served that has not given a token; what cannot leaves everything as it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from linker_core.engine import engine as engine_module
from linker_core.engine.devices import still_computes
from linker_core.engine.engine import EngineBrokenError
from linker_core.engine.messages import (
    CancelLoad,
    LoadFailed,
    ModelLoaded,
    Snapshot,
    UnloadModel,
)
from linker_core.engine.runner import Chunk, Runner
from linker_core.engine.snapshot import take_snapshot
from tests.linker_core.engine.driving import GREEDY, SMALL, Driver, load_message
from tests.linker_core.engine.families import reference_greedy
from tests.linker_core.engine.serving import PROMPT, Served, first_block, serve_three
from tests.tiny import make_variant, save_state

LONG = replace(GREEDY, max_tokens=40)


@pytest.fixture
def broken(served: Served, tmp_path: Path) -> Path:
    """A variant that gives NaN for every prompt."""
    path = make_variant(tmp_path / "broken", served.paths["base"], scale=0.1)
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_state(path, state)
    return path


def refusal(answer: ModelLoaded | LoadFailed) -> str:
    """The code and the message of a load that failed."""
    assert isinstance(answer, LoadFailed)
    return f"{answer.error['code']}: {answer.error['message']}"


def told(driver: Driver) -> Snapshot:
    return take_snapshot(driver.engine.residents, (), driver.engine.device)


def fail_new_slots(runner: Runner, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Lets the passes of every slot fail that is bound from here on."""
    known, forward = set(runner.model.slots), runner.forward

    def failing(chunks: Sequence[Chunk]) -> Any:
        if any(chunk.slot not in known for chunk in chunks):
            raise error
        return forward(chunks)

    monkeypatch.setattr(runner, "forward", failing)


def fill_cache(driver: Driver) -> list[str]:
    """Has sequences hold every page; returns their ids."""
    cache = driver.engine.residents.families["base"].cache
    ids = [driver.submit("base", [n + 3, *PROMPT], LONG) for n in range(3)]
    while cache.num_free_pages:
        driver.step()
    return ids


def test_variant_without_a_finite_first_token_is_not_served(served: Served, broken: Path) -> None:
    driver = served.driver
    want, before = driver.generate("own", PROMPT), told(driver)
    refused = refusal(driver.load(load_message("broken", broken, donor="base")))
    assert refused.startswith("unusable_model: Model 'broken' gave numbers that are not finite")
    assert told(driver) == before
    assert driver.generate("own", PROMPT) == want
    whole = load_message("broken", served.paths["half"], donor="base")
    assert isinstance(driver.load(whole), ModelLoaded)  # its name is free


def test_founder_without_a_finite_first_token_leaves_no_family(
    served: Served, broken: Path
) -> None:
    driver = served.driver
    before = told(driver)
    assert refusal(driver.load(load_message("founder", broken))).startswith("unusable_model")
    assert told(driver) == before
    assert list(driver.engine.residents.families) == ["base"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("a kernel failed"), "unusable_model: The engine failed while computing"),
        (AssertionError("a fault of ours"), "unusable_model: The engine failed while computing"),
        (MemoryError(), "insufficient_capacity: "),
        (torch.OutOfMemoryError("no memory"), "insufficient_capacity: "),
    ],
    ids=["kernel", "ours", "memory", "device-memory"],
)
def test_variant_whose_first_pass_fails_is_not_served(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    driver = served.driver
    want, before = driver.generate("half", PROMPT), told(driver)
    message = load_message("late", served.paths["own"], donor="base")
    with monkeypatch.context() as failing:
        fail_new_slots(driver.engine.residents.families["base"].runner, failing, error)
        assert refusal(driver.load(message)).startswith(code)
    assert told(driver) == before
    assert driver.generate("half", PROMPT) == want
    assert isinstance(driver.load(message), ModelLoaded)
    assert driver.generate("late", PROMPT) == driver.generate("own", PROMPT)


def test_plan_without_a_first_token_leaves_the_old_one_with_its_sequences(
    served: Served, broken: Path
) -> None:
    driver = served.driver
    running = driver.submit("half", PROMPT, LONG)
    driver.step()
    message = load_message("half", broken, donor="base", replaces=True)
    assert refusal(driver.load(message)).startswith("unusable_model")
    reference = served.references["half"]
    assert driver.tokens(running) == reference_greedy(reference, PROMPT, LONG.max_tokens)
    assert driver.generate("half", PROMPT) == reference_greedy(reference, PROMPT, 8)
    assert told(driver).leaving_bytes == 0


def test_first_token_is_nobodys_and_leaves_no_prefix(served: Served) -> None:
    driver = served.driver
    before, num_tokens = told(driver), sum(map(len, driver.outputs.values()))
    loaded = driver.load(load_message("late", served.paths["own"], donor="base"))
    assert isinstance(loaded, ModelLoaded)
    after = told(driver)
    assert after.kv_usage_ratio == 0.0
    assert (after.prefix_queries, after.prefix_hits, after.num_preemptions) == (
        before.prefix_queries,
        before.prefix_hits,
        before.num_preemptions,
    )
    assert sum(map(len, driver.outputs.values())) == num_tokens
    request_id = driver.submit("late", [0] * 9)
    driver.run()
    assert driver.outputs[request_id][0].num_cached_tokens == 0


def test_weights_give_a_first_token_once_in_an_engine_and_others_of_their_name_again(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = served.driver
    path = make_variant(tmp_path / "v", served.paths["base"], scale=0.2)
    message = load_message("v", path, donor="base")
    runner = driver.engine.residents.families["base"].runner
    tries, forward = 0, runner.forward

    def counting(chunks: Sequence[Chunk]) -> Any:
        nonlocal tries
        tries += 1
        return forward(chunks)

    monkeypatch.setattr(runner, "forward", counting)
    for expected, told_as in [
        (1, message),
        (1, message),  # evicted, and back
        (2, load_message("v", path, donor="base", aliased=first_block)),  # another plan
        (2, message),
        (3, load_message("v", served.paths["half"], donor="base")),  # other files
    ]:
        assert isinstance(driver.load(told_as), ModelLoaded)
        assert tries == expected
        driver.engine.handle(UnloadModel(model="v"))
        driver.run()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "bos_token_id": 3}))
    assert isinstance(driver.load(load_message("v", path, donor="base")), ModelLoaded)
    assert tries == 4  # the same files, computed otherwise


def test_weights_that_failed_to_give_a_first_token_are_tried_again(
    served: Served, broken: Path
) -> None:
    message = load_message("broken", broken, donor="base")
    for _ in range(2):
        assert refusal(served.driver.load(message)).startswith("unusable_model")


def test_first_token_waits_for_a_page_and_takes_none_from_others(tmp_path: Path) -> None:
    served = serve_three(tmp_path, "qwen2", replace(SMALL, kv_cache_tokens=56))
    driver = served.driver
    wants = [
        reference_greedy(served.references["base"], [n + 3, *PROMPT], LONG.max_tokens)
        for n in range(3)
    ]
    ids = fill_cache(driver)
    driver.engine.handle(load_message("late", served.paths["own"], donor="base"))
    while driver.engine.residents.families["base"].cache.num_free_pages == 0:
        driver.step()
        assert "late" not in driver.engine.residents.served
    driver.run()
    assert [driver.tokens(request_id) for request_id in ids] == wants
    assert driver.generate("late", PROMPT) == driver.generate("own", PROMPT)


@pytest.mark.parametrize("command", [CancelLoad(model="late"), UnloadModel(model="late")])
def test_load_that_is_given_up_while_it_waits_for_a_page_leaves_nothing(
    tmp_path: Path, command: CancelLoad | UnloadModel
) -> None:
    served = serve_three(tmp_path, "qwen2", replace(SMALL, kv_cache_tokens=56))
    driver = served.driver
    before = told(driver).models
    fill_cache(driver)
    driver.engine.handle(load_message("late", served.paths["own"], donor="base"))
    while driver.engine.residents._trying is None:
        driver.step()
    driver.engine.handle(command)
    driver.run()
    assert any(isinstance(e, LoadFailed) and e.model == "late" for e in driver.events)
    assert told(driver).models == before


def test_load_that_fails_with_its_device_ends_the_engine_instead(
    served: Served, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose device is gone would mark every model failed, one after the other."""
    driver = served.driver
    monkeypatch.setattr(engine_module, "still_computes", lambda _: False)
    driver.engine.handle(load_message("broken", broken, donor="base"))
    with pytest.raises(EngineBrokenError):
        driver.run()
    assert not any(isinstance(event, LoadFailed) for event in driver.events)


@pytest.mark.parametrize(
    ("error", "computes"),
    [
        (RuntimeError("an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("no memory"), True),
    ],
    ids=["broken", "full"],
)
def test_device_that_is_merely_full_still_computes(
    monkeypatch: pytest.MonkeyPatch, error: Exception, computes: bool
) -> None:
    assert still_computes(torch.device("cpu"))

    def failing(*_: object, **__: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(torch, "ones", failing)
    assert still_computes(torch.device("cpu")) is computes
