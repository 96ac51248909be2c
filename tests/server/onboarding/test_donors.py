"""Which donor a model gets where the request leaves it open, and what says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import LiveServer, live_server
from tests.server.onboarding.family import until_job
from tests.tiny import make_checkpoint, make_variant, retyped


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two donors of one signature that are strangers to each other, and a variant of each."""
    root = tmp_path_factory.mktemp("models")
    make_checkpoint(root / "one")
    make_checkpoint(root / "two", seed=9)
    make_checkpoint(root / "three", seed=10)
    make_variant(root / "of-one", root / "one", scale=0.02)
    make_variant(root / "of-two", root / "two", scale=0.02)
    make_variant(root / "nearer", root / "two", scale=0.01, seed=5)
    make_checkpoint(root / "other", hidden=64, layers=1, seed=3)
    return root


@pytest.fixture
def live(tmp_path: Path, root: Path) -> Iterator[LiveServer]:
    yield from serve(tmp_path / "state", root)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[LiveServer]:
    """For tests that change nothing."""
    yield from serve(tmp_path_factory.mktemp("state"), root)


def serve(state: Path, root: Path) -> Iterator[LiveServer]:
    with live_server(state, root=root) as server:
        for name in ("one", "two"):
            server.onboard(name, root / name).raise_for_status()
        yield server


def compared(choice: dict[str, Any]) -> dict[str, str]:
    return {found["donor"]: found["region"] for found in choice["candidates"]}


def test_strangers_of_one_signature_are_donors_of_families_of_their_own(
    standing: LiveServer,
) -> None:
    two = standing.client.get("/models/two").json()
    assert (two["donor"], two["family"], two["plan"]["policy"]) == (None, "two", "donor")
    choice = two["donor_choice"]
    assert "close enough" in choice["reason"]
    assert compared(choice) == {"one": "outside"}
    assert choice["candidates"][0]["mean_epsilon"] > 1
    assert choice["candidates"][0]["mean_cos"] < 0.97


def test_variant_leans_on_the_donor_it_is_closest_to(live: LiveServer, root: Path) -> None:
    for name, donor in (("of-one", "one"), ("of-two", "two")):
        card = live.onboard(name, root / name).json()
        assert (card["donor"], card["donor_choice"]["donor"]) == (donor, donor)
        regions = dict.fromkeys(("one", "two"), "outside") | {donor: "aligned"}
        assert compared(card["donor_choice"]) == regions
        (newest, *_) = live.client.get("/models/jobs").json()["data"]
        assert newest["result"]["donor_choice"] == card["donor_choice"]


def test_of_two_donors_of_one_family_the_nearer_is_chosen(live: LiveServer, root: Path) -> None:
    """`of-two` holds a family of its own here, and lies farther from `nearer` than `two` does."""
    live.onboard("cousin", root / "of-two", donor="two").raise_for_status()
    live.client.delete("/models/cousin").raise_for_status()
    live.client.delete("/models/two").raise_for_status()
    assert live.onboard("cousin", root / "of-two").json()["donor"] is None
    live.onboard("three", root / "three").raise_for_status()
    assert live.onboard("nearer", root / "nearer").json()["donor"] == "cousin"


def test_dry_run_says_the_same_and_why(standing: LiveServer, root: Path) -> None:
    def ask(name: str) -> dict[str, Any]:
        answer = standing.client.post("/models/plan", json={"source": str(root / name)})
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    near, far, other = ask("of-two"), ask("three"), ask("other")
    assert (near["donor"], near["donor_choice"]["donor"]) == ("two", "two")
    assert compared(near["donor_choice"]) == {"one": "outside", "two": "aligned"}
    assert (far["donor"], far["policy"]) == (None, "donor")
    assert compared(far["donor_choice"]) == {"one": "outside", "two": "outside"}
    assert other["donor"] is None
    for candidate in other["donor_choice"]["candidates"]:
        assert "hidden_size: donor 48, variant 64" in candidate["differs"]


def test_shape_alone_leans_on_the_first_of_its_signature(standing: LiveServer, root: Path) -> None:
    shape = root / "shape"
    shape.mkdir()
    (shape / "config.json").write_bytes((root / "two" / "config.json").read_bytes())
    answer = standing.client.post("/models/plan", json={"source": str(shape)}).json()
    assert answer["donor"] == "one"
    assert "no weights were read" in answer["donor_choice"]["reason"]


def test_named_donor_is_taken_however_far_it_is(live: LiveServer, root: Path) -> None:
    card = live.onboard("three", root / "three", donor="one").json()
    assert (card["donor"], card["plan"]["region"]) == ("one", "outside")
    assert card["donor_choice"] == {
        "donor": "one", "reason": "The request names it.", "candidates": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 5e5}, "rope.theta: donor 10000.0, variant 500000.0"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "rope.kind: donor default, variant linear",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: donor silu, variant gelu"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: donor 1e-06, variant 1e-05"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_"),
        ({"compression_config": {"format": "marlin"}}, "compression_config is {'format'"),
        ({"architectures": ["PhiForCausalLM"]}, "architectures is ['PhiForCausalLM'], expected"),
    ],
)
def test_named_donor_of_other_arithmetic_is_refused_at_once_with_both_values(
    standing: LiveServer, root: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = root / f"changed-{tmp_path.name}"
    make_variant(folder, root / "one", scale=0.02)
    record = json.loads((folder / "config.json").read_text())
    if "rope_theta" in change or "rope_scaling" in change:
        record.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(record | change))
    response = standing.onboard("changed", folder, wait=False, donor="one")
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
    assert standing.client.get("/models/changed").status_code == 404


def test_named_donor_of_other_shapes_is_refused_with_both_values(
    standing: LiveServer, root: Path
) -> None:
    response = standing.onboard("other", root / "other", wait=False, donor="one")
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    for field, donor, variant in (("hidden_size", 48, 64), ("num_layers", 2, 1)):
        assert f"{field}: donor {donor}, variant {variant}" in message


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_float_type_finds_its_donor_and_is_counted(
    live: LiveServer, root: Path, dtype: str
) -> None:
    folder = retyped(root / f"of-two-{dtype}", root / "of-two", dtype)
    card = live.onboard("retyped", folder, policy="exact").json()
    assert card["donor"] == "two"
    size = 4 if dtype == "float32" else 2
    plain = live.onboard("plain", root / "of-two", policy="exact").json()
    assert card["bytes"]["logical"] == plain["bytes"]["logical"] * size // 2


def test_comparison_is_made_once(
    live: LiveServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    scanner = live.services.onboarder._jobs._arrivals._planner._scanner
    compare = scanner.compare

    async def counting(variant: Path, donors: list[Path], **more: Any) -> Any:
        asked.append([donor.name for donor in donors])
        return await compare(variant, donors, **more)

    monkeypatch.setattr(scanner, "compare", counting)
    body = {"source": str(root / "nearer")}
    for _ in range(2):
        live.client.post("/models/plan", json=body).raise_for_status()
    assert asked == [["one", "two"]]
    live.onboard("nearer", root / "nearer").raise_for_status()
    live.onboard("three", root / "three").raise_for_status()
    asked.clear()
    live.client.post("/models/plan", json=body).raise_for_status()
    assert asked == [["three"]]  # what is known of the others still holds


def test_whole_scan_of_a_pair_is_as_good_as_a_comparison(
    live: LiveServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.onboard("nearer", root / "nearer", donor="two").raise_for_status()
    scanner = live.services.onboarder._jobs._arrivals._planner._scanner
    asked: list[str] = []
    compare = scanner.compare

    async def counting(variant: Path, donors: list[Path], **more: Any) -> Any:
        asked.extend(donor.name for donor in donors)
        return await compare(variant, donors, **more)

    monkeypatch.setattr(scanner, "compare", counting)
    answer = live.client.post("/models/plan", json={"source": str(root / "nearer")}).json()
    assert asked == ["one"]
    two = next(c for c in answer["donor_choice"]["candidates"] if c["donor"] == "two")
    assert two["mean_epsilon"] == answer["mean_epsilon"]


def test_donor_whose_files_are_gone_is_passed_over(live: LiveServer, root: Path) -> None:
    make_checkpoint(root / "short-lived", seed=20)
    make_variant(root / "orphan", root / "short-lived", scale=0.02)
    live.onboard("short-lived", root / "short-lived").raise_for_status()
    (root / "short-lived" / "model.safetensors").unlink()
    card = live.onboard("orphan", root / "orphan").json()
    assert card["donor"] is None
    found = {c["donor"]: c for c in card["donor_choice"]["candidates"]}
    assert "no model*.safetensors" in found["short-lived"]["error"]
    assert found["one"]["region"] == "outside"


def test_choice_outlives_a_restart(tmp_path: Path, root: Path) -> None:
    with live_server(tmp_path / "state", root=root) as server:
        for name in ("one", "of-one"):
            server.onboard(name, root / name).raise_for_status()
        before = server.client.get("/models/of-one").json()["donor_choice"]
    with live_server(tmp_path / "state", root=root) as server:
        server.until_ready()
        assert server.client.get("/models/of-one").json()["donor_choice"] == before


def test_donor_that_arrives_during_the_comparison_is_compared_too(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live_server(tmp_path / "state", root=root) as server:
        server.onboard("one", root / "one").raise_for_status()
        server.onboard("two", root / "two").raise_for_status()
        late = server.services.catalog.get("two")
        assert late is not None
        server.services.catalog.retract("two")
        donors = server.services.onboarder._jobs._arrivals._donors
        make = donors._comparisons.make
        asked: list[list[str]] = []

        async def then_comes_another(text: Any, donors: Any, **more: Any) -> None:
            asked.append([donor.name for donor in donors])
            await make(text, donors, **more)
            server.services.catalog.publish(late)

        monkeypatch.setattr(donors._comparisons, "make", then_comes_another)
        job = server.onboard("of-two", root / "of-two", wait=False).json()
        until_job(server, job["id"], "succeeded")
        assert asked == [["one"], ["one", "two"]]
        assert server.client.get("/models/of-two").json()["donor"] == "two"
