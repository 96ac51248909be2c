"""Models coming and going while others are there: refusals leave everything as it was."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from linker_core.engine.messages import LoadFailed, LoadModel, ModelLoaded, UnloadModel
from tests.linker_core.engine.driving import GREEDY, Driver, load_message
from tests.linker_core.engine.families import reference_greedy, reference_model
from tests.tiny import make_checkpoint, make_variant

PROMPT = [300, 17, 254, 8, 91, 411, 5]


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
    last_leaf = family.runner._leaves[-1]
    free = driver.engine.residents.pool.free_bytes()

    def refuse(_slot: int, _tensors: object) -> None:
        raise KeyError("lm_head.weight")

    with monkeypatch.context() as patched:
        patched.setattr(last_leaf, "bind", refuse)
        answer = driver.load(load_message("variant", path, donor="base"))
    assert isinstance(answer, LoadFailed)
    assert driver.engine.residents.pool.free_bytes() == free
    assert all(len(leaf.stored) == 1 for leaf in family.runner._leaves)
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
