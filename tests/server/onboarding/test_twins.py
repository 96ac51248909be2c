"""A variant's own weights beside the variant: the same answers as the checkpoint, and no trace."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from linker_core.config import EngineConfig
from linker_core.engine.kv_size import kv_cache_bytes
from server.onboarding.prepare import read_text_side
from server.onboarding.twin_rows import twin_name
from server.residency.catalog import ServedModel
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.family import residual
from tests.tiny import make_checkpoint, make_variant

KV_TOKENS = 256
SHARES_ALL = {"policy": "thresholds", "tau_cos": 0.0, "tau_frob": 1e6}
PROMPT = [9, 10, 11, 12, 13, 14]
TWIN = twin_name("far")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twins")
    base = make_checkpoint(root / "base")
    make_variant(root / "far", base, scale=0.5, seed=1)
    make_variant(root / "odd", base, scale=0.5, seed=2)
    return root


@pytest.fixture(scope="module")
def live(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The real engine with a donor and room for all; each test has a variant of its own."""
    with serving(sources, tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture
def lone(sources: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """The same for one test, which takes the donor away."""
    with serving(sources, tmp_path) as server:
        yield server


def serving(sources: Path, state: Path, **engine: Any) -> Any:
    return live_server(
        state,
        models={"base": sources / "base"},
        root=sources,
        engine_command=None,
        settings={"engine": {"kv_cache_tokens": KV_TOKENS, **engine}},
    )


def onboard(live: LiveServer, source: Path, name: str | None = None, **sharing: Any) -> None:
    live.until_ready()
    options = {"donor": "base", **(sharing or SHARES_ALL)}
    response = live.onboard(name or source.name, source, **options)
    assert response.status_code == 201, response.text


def scores(live: LiveServer, name: str, mode: str | None = None) -> list[float]:
    """Returns the log-probability of every token of the prompt but its first."""
    said = ask(live, name, mode)
    assert said.status_code == 200, said.text
    found: list[float] = said.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(PROMPT)]
    return found


def ask(live: LiveServer, name: str, mode: str | None = None, **more: Any) -> httpx.Response:
    said = {} if mode is None else {"variant_mode": mode}
    body = {"temperature": 0, "max_tokens": 4, "logprobs": 1, "echo": True, **more, **said}
    return live.complete(name, PROMPT, **body)


def reference(path: Path) -> list[float]:
    """Returns the same scores of the checkpoint itself, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return [logprobs[at, token].item() for at, token in enumerate(PROMPT[1:])]


def resident(live: LiveServer) -> set[str]:
    return {model.name for model in live.services.catalog.models()}


def in_engine(live: LiveServer) -> set[str]:
    found = live.services.engine.snapshot
    assert found is not None
    return set(found.models)


def test_unshared_mode_scores_as_the_checkpoint_does_and_planned_does_not(
    live: LiveServer, sources: Path
) -> None:
    onboard(live, sources / "far", "scored")
    expected = reference(sources / "far")
    assert scores(live, "scored", "unshared") == pytest.approx(expected, abs=1e-4)
    assert scores(live, "scored", "planned") == scores(live, "scored")
    assert scores(live, "scored") != pytest.approx(expected, abs=1e-2)


def test_unshared_chat_answers_in_the_models_name_and_counts_as_its(
    live: LiveServer, sources: Path
) -> None:
    onboard(live, sources / "far", "named")
    tokens = live.metric('linker_generation_tokens_total{model="named"}')
    said = live.chat("named", variant_mode="unshared", max_tokens=3, ignore_eos=True)
    assert said.status_code == 200, said.text
    assert said.json()["model"] == "named"
    assert live.metric('linker_generation_tokens_total{model="named"}') == tokens + 3


def test_both_weights_answer_side_by_side_and_the_twin_comes_once(
    live: LiveServer, sources: Path
) -> None:
    onboard(live, sources / "far", "both")
    planned, own = scores(live, "both"), reference(sources / "far")

    def holds(turn: int) -> bool:
        expected, mode = ((planned, "planned"), (own, "unshared"))[turn % 2]
        return scores(live, "both", mode) == pytest.approx(expected, abs=1e-4)

    catalog, published = live.services.catalog, list[str]()
    publish = catalog.publish

    def counted(model: ServedModel) -> None:
        published.append(model.name)
        publish(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "publish", counted)
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(holds, range(16)))
    assert published == [twin_name("both")]


def test_twin_is_in_no_listing_and_its_bytes_are_its_familys(
    live: LiveServer, sources: Path
) -> None:
    onboard(live, sources / "far", "hidden")
    twin = twin_name("hidden")
    assert ask(live, "hidden", "unshared").status_code == 200
    live.until(lambda: twin in in_engine(live))
    for path in ("/v1/models", "/models"):
        assert twin not in {model["id"] for model in live.client.get(path).json()["data"]}
    assert live.client.get(f"/models/{twin}").status_code == 404
    assert live.complete(twin, PROMPT).status_code == 404
    assert twin not in live.client.get("/metrics").text
    snapshot = live.services.engine.snapshot
    assert snapshot is not None
    assert snapshot.models[twin].unique > 0
    held = sum(model.unique for model in snapshot.models.values())
    assert live.metric('linker_family_weight_bytes{family="base"}') == held


@pytest.mark.parametrize(
    ("name", "sharing"),
    [("exact", {"policy": "exact"}), ("apart", {"tau_cos": 1.0, "tau_frob": 0.0})],
)
def test_model_that_serves_its_own_weights_is_its_own_twin(
    live: LiveServer, sources: Path, name: str, sharing: dict[str, Any]
) -> None:
    onboard(live, sources / "far", name, **sharing)
    for model in ("base", name):
        assert scores(live, model, "unshared") == scores(live, model)
        assert twin_name(model) not in resident(live)


def test_deleting_a_model_takes_its_twin_along_after_its_requests(
    live: LiveServer, sources: Path
) -> None:
    onboard(live, sources / "far", "deleted")
    body = {"model": "deleted", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True,
            "stream": True, "variant_mode": "unshared"}  # fmt: skip
    with live.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        deleting = threading.Thread(target=live.client.delete, args=("/models/deleted",))
        deleting.start()
        live.until(lambda: live.client.get("/models/deleted").status_code == 404)
        assert ask(live, "deleted", "unshared").status_code == 404
        assert list(lines)[-2] == "data: [DONE]"
    deleting.join(60)
    live.until(lambda: not {"deleted", twin_name("deleted")} & in_engine(live))


def test_model_of_a_deleted_ones_name_has_a_twin_of_its_own(
    live: LiveServer, sources: Path
) -> None:
    onboard(live, sources / "far", "again")
    before = scores(live, "again", "unshared")
    assert live.client.delete("/models/again").status_code == 200
    onboard(live, sources / "odd", "again")
    assert scores(live, "again", "unshared") != before
    assert scores(live, "again", "unshared") == pytest.approx(reference(sources / "odd"), abs=1e-4)


def test_planning_a_model_anew_changes_no_answer_of_its_own_weights(
    live: LiveServer, sources: Path
) -> None:
    onboard(live, sources / "far", "changed")
    before = scores(live, "changed", "unshared")
    changed = live.client.patch("/models/changed", params={"wait": True}, json={"policy": "exact"})
    assert changed.status_code == 200, changed.text
    assert scores(live, "changed") == pytest.approx(before, abs=1e-5)
    assert scores(live, "changed", "unshared") == scores(live, "changed")


def test_prompt_that_cannot_be_answered_brings_no_twin(live: LiveServer, sources: Path) -> None:
    onboard(live, sources / "far", "long")
    refused = ask(live, "long", "unshared", max_tokens=10**6)
    assert refused.status_code == 400
    assert twin_name("long") not in resident(live)


def test_model_that_came_as_a_delta_has_no_unshared_weights(
    live: LiveServer, sources: Path
) -> None:
    residual(make_variant(sources / "coded", sources / "base", scale=0.05), {"0.001": "int4:64"})
    onboard(live, sources / "coded", policy="budget", donor="base")
    [folder] = (live.services.settings.state_directory() / "deltas").iterdir()
    shutil.copytree(folder, sources / "delta")
    onboard(live, sources / "delta", donor="base")
    error = ask(live, "delta", "unshared").json()["error"]
    assert error["param"] == "variant_mode"
    assert ask(live, "delta").status_code == 200


def test_twin_comes_back_with_the_engine(live: LiveServer, sources: Path) -> None:
    onboard(live, sources / "far", "crashed")
    before = scores(live, "crashed", "unshared")
    live.services.engine.client.shut_down()
    live.until(lambda: live.client.get("/ready").status_code == 503)
    live.until_ready()
    assert scores(live, "crashed", "unshared") == before


def test_unloading_a_donor_takes_the_twins_of_unloaded_variants_along(
    lone: LiveServer, sources: Path
) -> None:
    onboard(lone, sources / "far")
    expected = scores(lone, "far", "unshared")
    for name in ("far", "base"):
        response = lone.client.post("/models/unload", json={"model": name})
        assert response.status_code == 200, response.text
    lone.until(lambda: in_engine(lone) == set())
    assert scores(lone, "far", "unshared") == expected
    assert resident(lone) == {"base", TWIN}


def test_twin_that_was_never_there_is_kept_away_too_while_its_donor_leaves(
    lone: LiveServer, sources: Path
) -> None:
    onboard(lone, sources / "far")
    assert lone.client.post("/models/unload", json={"model": "far"}).status_code == 200
    evictions, kept_away = lone.services.evictions, list[bool]()
    unload = evictions.unload

    async def unload_seen(name: str) -> None:
        kept_away.append(lone.services.catalog.turn(TWIN).locked())
        await unload(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evictions, "unload", unload_seen)
        assert lone.client.post("/models/unload", json={"model": "base"}).status_code == 200
    assert kept_away == [True]
    assert ask(lone, "far", "unshared").status_code == 200


def test_rehomed_variants_have_twins_as_before(lone: LiveServer, sources: Path) -> None:
    onboard(lone, sources / "far")
    onboard(lone, sources / "odd")
    expected = {name: scores(lone, name, "unshared") for name in ("far", "odd")}
    assert lone.client.delete("/models/base", params={"rehome": True}).status_code == 200
    for name, before in expected.items():
        assert scores(lone, name, "unshared") == before
    assert resident(lone) == {"far", "odd", TWIN, twin_name("odd")}
    # One of them is the head of the family by now, on which its own twin leans.
    assert lone.client.delete("/models/far", params={"rehome": True}).status_code == 200
    assert scores(lone, "odd", "unshared") == expected["odd"]
    lone.until(lambda: in_engine(lone) == {"odd", twin_name("odd")})
    assert lone.client.delete("/models/odd").status_code == 200
    lone.until(lambda: in_engine(lone) == set())


def test_twins_take_turns_where_they_do_not_fit_together_and_are_507_where_none_does(
    sources: Path, tmp_path: Path
) -> None:
    text = read_text_side(sources / "base")
    cache_bytes = kv_cache_bytes(text.config, EngineConfig(kv_cache_tokens=KV_TOKENS))
    room = int(2.7 * text.checkpoint_bytes) + cache_bytes
    with serving(sources, tmp_path, memory_budget=room) as live:
        onboard(live, sources / "far")
        onboard(live, sources / "odd")
        for name, other in (("far", "odd"), ("odd", "far")):
            assert ask(live, name, "unshared").status_code == 200
            assert twin_name(name) in resident(live)
            assert twin_name(other) not in resident(live)
        asked = {"source": str(sources / "far"), "donor": "base", "policy": "exact"}
        plan = live.client.post("/models/plan", json=asked).json()
        assert plan["fits"]  # once the twin has left, of whom nobody is told
        assert plan["bytes"]["unique"] > plan["free_bytes"]
        assert "(unshared)" not in str(plan["would_evict"])
    with serving(sources, tmp_path, memory_budget=room - text.checkpoint_bytes) as live:
        live.until_ready()
        assert ask(live, "far", "unshared").status_code == 507
        assert ask(live, "base").status_code == 200
