"""A donor that leaves its family: nothing moves, no answer changes, a restart brings all back.

With the real engine, over variants of every rung.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from linker_core.weights.checkpoint import Checkpoint
from server.bridge.process import ENGINE_COMMAND
from tests.lora import make_adapter
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.family import open_registry, residual
from tests.tiny import make_checkpoint, make_variant

PROMPT = "Once upon a time there was a donor"
OPTIONS: dict[str, dict[str, Any]] = {
    "aliased": {"tau_cos": 0.9, "tau_frob": 0.1},
    "own": {"policy": "exact"},
    "rows": {"policy": "exact"},
    "residual": {"policy": "budget"},
    "adapter": {},
}
VARIANTS = tuple(OPTIONS)


class Answer(NamedTuple):
    """What a model says, and how likely it finds every token of prompt and answer."""

    text: str
    logprobs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Checkpoints, and the state of a server that served them all."""

    root: Path
    state: Path
    answers: dict[str, Answer]
    weight_bytes: float


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root, state = tmp_path_factory.mktemp("family"), tmp_path_factory.mktemp("known") / "state"
    base = make_checkpoint(root / "base", hidden=128, intermediate=128, tie=False)
    make_variant(root / "aliased", base, scale=0.01)
    make_variant(root / "own", base, scale=0.5, seed=2)
    make_variant(root / "rows", base, scale={}, seed=3, added_tokens=("<|tool|>",))
    residual(make_variant(root / "residual", base, scale=0.05, seed=4), {"0.001": "int4:64"})
    make_adapter(root / "adapter", base)
    with serving(root, state) as server:
        assert server.onboard("base", base).status_code == 201
        for name, options in OPTIONS.items():
            response = server.onboard(name, root / name, donor="base", **options)
            assert response.status_code == 201, response.text
        assert rungs(server, "aliased") == {"alias", "own"}
        assert rungs(server, "own") == {"own"}
        assert rungs(server, "rows") == {"alias", "rows"}
        assert rungs(server, "residual") == {"int4", "own"}
        assert any(rung.startswith("rank") for rung in rungs(server, "adapter"))
        found = answers(server, "base", *VARIANTS)
        assert len({tuple(said.logprobs) for said in found.values()}) == len(found)
        return Family(root=root, state=state, answers=found, weight_bytes=weight_bytes(server))


@pytest.fixture
def state(family: Family, tmp_path: Path) -> Path:
    """The state again, for one test to change."""
    return Path(shutil.copytree(family.state, tmp_path / "state"))


@pytest.fixture
def server(family: Family, state: Path) -> Iterator[LiveServer]:
    with serving(family.root, state) as live:
        live.until_ready()
        yield live


def serving(root: Path, state: Path) -> AbstractContextManager[LiveServer]:
    return live_server(
        state,
        root=root,
        engine_command=ENGINE_COMMAND,
        settings={"engine": {"kv_cache_tokens": 2048}},
    )


def answer(server: LiveServer, model: str) -> Answer:
    more = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "logprobs": 0, "echo": True}
    response = server.complete(model, PROMPT, **more)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return Answer(choice["text"], choice["logprobs"]["token_logprobs"][1:])


def answers(server: LiveServer, *models: str) -> dict[str, Answer]:
    return {model: answer(server, model) for model in models}


def weight_bytes(server: LiveServer) -> float:
    return server.metric('linker_device_memory_bytes{device="cpu",state="weights"}')


def card(server: LiveServer, model: str) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get(f"/models/{model}").json()
    return found


def unique_bytes(server: LiveServer, *models: str) -> float:
    held: list[int] = [card(server, model)["bytes"]["unique"] for model in models]
    return sum(held)


def rungs(server: LiveServer, model: str) -> set[str]:
    row = server.services.roster.model(model)
    assert row.plan is not None
    return {str(rung).partition(":")[0] for rung in row.plan["rungs"].values()}


def rehome(server: LiveServer, model: str) -> str:
    """Deletes a donor; returns the one in its place."""
    response = server.client.delete(f"/models/{model}", params={"rehome": True})
    assert response.status_code == 200, response.text
    heads = [row.name for row in server.services.roster.models() if row.donor is None]
    assert len(heads) == 1
    return heads[0]


def others(answers: dict[str, Answer], *gone: str) -> dict[str, Answer]:
    return {model: said for model, said in answers.items() if model not in gone}


def outside_blocks_bytes(path: Path) -> int:
    with Checkpoint.open(path) as checkpoint:
        return sum(t.nbytes for name, t in checkpoint.tensors.items() if ".layers." not in name)


def test_donor_that_leaves_changes_no_answer_and_moves_nothing(
    family: Family, server: LiveServer
) -> None:
    refused = server.client.delete("/models/base")
    assert refused.status_code == 409
    assert all(name in refused.json()["error"]["message"] for name in VARIANTS)
    asked = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}
    whole = server.complete("base", PROMPT, **asked).json()["choices"][0]["text"]
    body = {"model": "base", "prompt": PROMPT, "stream": True, **asked}
    deleted: list[httpx.Response] = []
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        read = [next(lines)]
        deleting = in_thread(lambda: deleted.append(
            server.client.delete("/models/base", params={"rehome": True})
        ))  # fmt: skip
        server.until(lambda: server.client.get("/models/base").status_code == 404)
        during = answers(server, *VARIANTS)
        read += lines
    chunks = [line.removeprefix("data: ") for line in read if line]
    assert chunks.pop() == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == whole
    deleting.join(60)
    assert deleted[0].status_code == 200
    assert during == answers(server, *VARIANTS) == others(family.answers, "base")
    assert {card(server, name)["donor"] for name in VARIANTS} == {None, "rows"}  # shares most
    assert weight_bytes(server) == family.weight_bytes  # `rows` reaches all of the base
    assert weight_bytes(server) == unique_bytes(server, *VARIANTS)


def test_what_no_variant_aliases_leaves_with_the_donor(family: Family, server: LiveServer) -> None:
    for name in ("rows", "residual", "adapter"):
        assert server.client.delete(f"/models/{name}").status_code == 200
    held = weight_bytes(server)
    assert rehome(server, "base") == "aliased"
    assert answers(server, "aliased", "own") == others(
        family.answers, "base", "rows", "residual", "adapter"
    )
    # Under thresholds all blocks are aliased, and nothing else.
    assert weight_bytes(server) == held - outside_blocks_bytes(family.root / "base")
    assert weight_bytes(server) == unique_bytes(server, "aliased", "own")


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_restart_after_donors_left_brings_the_same_tensors_back(
    family: Family, state: Path
) -> None:
    left: dict[str, Answer] = others(family.answers, "base")
    with serving(family.root, state) as server:
        server.until_ready()
        first = rehome(server, "base")
    with serving(family.root, state) as server:
        server.until_ready()
        assert answers(server, *left) == left
        assert weight_bytes(server) == family.weight_bytes
        left = others(left, first)
        second = rehome(server, first)
        assert answers(server, *left) == left
        held = weight_bytes(server)
        assert held == unique_bytes(server, *left)
    with serving(family.root, state) as server:
        server.until_ready()
        assert card(server, second)["donor"] is None
        assert answers(server, *left) == left
        assert weight_bytes(server) == held
        registry = server.services.registry
        assert [base.source for base in registry.bases()] == [str(family.root / "base")]
        for name in [*others(left, second), second]:
            assert server.client.delete(f"/models/{name}").status_code == 200
        assert registry.bases() == []  # nothing refers to it any more
        assert weight_bytes(server) == 0


def test_donor_that_is_unloaded_comes_back_as_a_variant_without_bytes(
    family: Family, server: LiveServer
) -> None:
    server.call(server.services.onboarder.unload("base", rehome=True))
    gone = card(server, "base")
    assert (gone["state"], gone["donor"]) == ("unloaded", "rows")
    assert answers(server, *VARIANTS) == others(family.answers, "base")
    assert answer(server, "base") == family.answers["base"]
    back = card(server, "base")
    assert (back["state"], back["bytes"]["unique"]) == ("ready", 0)
    assert weight_bytes(server) == family.weight_bytes
    # Another of its fine-tunes is planned against it, under either name.
    for donor in ("base", "rows"):
        again = server.onboard(f"again-{donor}", family.root / "aliased", donor=donor)
        assert again.status_code == 201, again.text
        assert answer(server, f"again-{donor}") == family.answers["aliased"]
        assert card(server, f"again-{donor}")["donor"] == "rows"


def test_base_whose_files_changed_fails_its_family_and_says_so(
    family: Family, state: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(family.root, tmp_path / "root"))
    shutil.rmtree(state)
    with serving(root, state) as server:
        assert server.onboard("base", root / "base").status_code == 201
        assert server.onboard("aliased", root / "aliased", **OPTIONS["aliased"]).status_code == 201
        assert rehome(server, "base") == "aliased"
        assert answer(server, "aliased") == family.answers["aliased"]
    weights = root / "base" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with serving(root, state) as server:
        server.until(lambda: card(server, "aliased")["state"] == "failed")
        error = card(server, "aliased")["error"]
        assert error["code"] == "bad_checkpoint"
        assert "The checkpoint that the family of this model shares" in error["message"]
    weights.write_bytes(data)
    registry = open_registry(state)
    assert len(registry.bases()) == 1  # somebody may want to mend it
    registry.close()
