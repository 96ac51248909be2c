"""Plans for several variants at once, over a tuner whose prices are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_tuner import LOG
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.family import delta_folders, loads, residual
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A donor, two variants with three plans each, and a model of another family."""
    root = tmp_path_factory.mktemp("fit")
    base = make_checkpoint(root / "base")
    for name, seed, kls in (("one", 1, (0.1, 0.2, 0.4)), ("two", 2, (0.15, 0.3, 0.6))):
        variant = make_variant(root / name, base, scale=0.01, seed=seed)
        rungs = dict(zip(map(str, kls), ("int4:64", "int2:64", "signs:64"), strict=True))
        residual(variant, rungs)
    make_checkpoint(root / "other", layers=3)
    return root


@pytest.fixture(scope="module")
def live(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    state = tmp_path_factory.mktemp("state")
    with live_server(state, models={"base": root / "base"}, root=root) as server:
        server.until_ready()
        assert server.onboard("other", root / "other").status_code == 201
        yield server


def ask(server: LiveServer, root: Path, budget: int, *names: str, **more: Any) -> Any:
    models = [{"name": name, "source": str(root / name)} for name in names or ("one", "two")]
    body = {"models": models, "budget_bytes": budget, "donor": "base"} | more
    return server.client.post("/models/plan", json=body)


def size(server: LiveServer, root: Path, *names: str) -> tuple[int, list[int]]:
    """Returns the donor's bytes and what the dearest plan of each takes."""
    answer = ask(server, root, 2**40, *names).json()
    return answer["donor_bytes"], [model["unique_bytes"] for model in answer["models"]]


def refusal(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_room_for_all_gives_everyone_the_best_plan(live: LiveServer, root: Path) -> None:
    answer = ask(live, root, 2**40).json()
    assert (answer["object"], answer["donor"], answer["fits"]) == ("model.fit", "base", True)
    one, two = answer["models"]
    assert [one["name"], two["name"]] == ["one", "two"]
    assert [one["price"]["kl"], two["price"]["kl"]] == [0.1, 0.15]
    assert set(one["rung_bytes"]) == {"int4", "own"}
    assert sum(one["rung_bytes"].values()) == one["unique_bytes"]
    assert answer["unique_bytes"] == one["unique_bytes"] + two["unique_bytes"]
    assert 4 < one["bits_per_weight"] < 16
    assert answer["left_out"] == []
    assert loads(root / "one") == []
    assert delta_folders(live.services.settings.state_directory()) == []


def test_too_little_for_that_makes_the_worst_as_good_as_it_can_be(
    live: LiveServer, root: Path
) -> None:
    donor, best = size(live, root)
    answer = ask(live, root, donor + sum(best) - 1).json()
    # Both in four bits do not fit; with `one` in two bits the worst is 0.2, else it is 0.3.
    assert [model["price"]["kl"] for model in answer["models"]] == [0.2, 0.15]
    assert donor + answer["unique_bytes"] <= answer["budget_bytes"]


def test_what_does_not_fit_is_named_with_the_least_total(live: LiveServer, root: Path) -> None:
    donor, _ = size(live, root)
    answer = ask(live, root, donor).json()
    assert (answer["fits"], answer["left_out"]) == (False, ["one", "two"])
    assert answer["models"] == [{"name": name, "fits": False} for name in ("one", "two")]
    least = answer["least_bytes"]
    assert ask(live, root, least).json()["fits"] is True
    partly = ask(live, root, least - 1).json()
    assert (partly["fits"], len(partly["left_out"])) == (False, 1)
    assert sorted(model["fits"] for model in partly["models"]) == [False, True]


def test_budget_that_the_donor_alone_exceeds_is_refused_before_anything_is_priced(
    live: LiveServer, root: Path
) -> None:
    donor, _ = size(live, root)
    make_variant(root / "late", root / "base", scale=0.01, seed=3)
    error = refusal(ask(live, root, donor - 1, "late"), 400)
    assert (error["param"], str(donor) in error["message"]) == ("budget_bytes", True)
    assert not (root / "late" / LOG).exists()


def test_spread_is_priced_once(live: LiveServer, root: Path) -> None:
    ask(live, root, 2**40)
    again = ask(live, root, 2**39).json()
    assert (again["seconds"]["tune"], again["seconds"]["scan"]) == (0, 0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"models": []}, "models"),
        ({"models": [{"source": "one"}] * 17}, "models"),
        ({"models": [{"source": "one"}, {"source": "one"}]}, "models"),
        ({"models": [{"source": "one", "policy": "exact"}]}, "models.0.policy"),
        ({"models": [{"source": "one"}], "budget_bytes": -1}, "budget_bytes"),
        ({"models": [{"source": "one"}], "budget_bytes": None}, "budget_bytes"),
        ({"models": [{"source": "one"}], "budget_kl": 0.1}, "budget_kl"),
        ({"models": [{"source": ""}]}, "source"),
        ({"models": [{"source": "one"}, {"source": "other"}], "donor": "auto"}, "models"),
    ],
)
def test_bad_questions_are_refused(live: LiveServer, body: dict[str, Any], param: str) -> None:
    response = live.client.post("/models/plan", json={"budget_bytes": 2**40} | body)
    assert refusal(response, 400)["param"] == param


def test_sources_and_donors_are_checked_as_elsewhere(live: LiveServer, root: Path) -> None:
    assert refusal(ask(live, root, 1, "../x"), 403)["code"] == "forbidden_source"
    assert refusal(ask(live, root, 1, "nothing"), 400)["code"] == "bad_checkpoint"
    assert refusal(ask(live, root, 1, donor="nobody"), 404)["param"] == "donor"
    assert refusal(ask(live, root, 2**40, "one", donor="other"), 400)["code"] == "bad_checkpoint"
