"""Policy budget through a whole server, with a tuner whose prices are known beforehand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linker_core.sharing.rungs import ENCODING
from linker_core.tuning import request
from server.onboarding import pricing
from tests.server.fake_engine import Fault
from tests.server.fake_tuner import BLOCKER, KL, KL_UPPER, LOG, TOKENS
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.family import residual, until_job
from tests.tiny import make_checkpoint, make_variant

PRICE = {
    "kl": KL, "kl_upper": KL_UPPER, "top1": 1 - KL, "ppl_ratio": 1 + KL, "tokens": TOKENS,
    "calibration": "text", "matmul_precision": "highest", "encoding": ENCODING,
}  # fmt: skip
BUDGET: dict[str, dict[str, object]] = {"sharing": {"policy": "budget"}}


def tunings(path: Path) -> list[dict[str, Any]]:
    """Returns what tuners were asked about a checkpoint."""
    log = path / LOG
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def refusal(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.fixture
def priced(tmp_path: Path, models: dict[str, Path]) -> Iterator[LiveServer]:
    """A server of `base` alone that prices what it onboards."""
    with live_server(
        tmp_path / "state", models={"base": models["base"]}, root=tmp_path, limits=LIMITS,
        settings=BUDGET,
    ) as server:  # fmt: skip
        server.until_ready()
        yield server


def test_model_onboarded_without_a_policy_carries_its_price(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    card = priced.onboard("near", models["near"]).json()
    assert tunings(models["near"]) == [
        {
            "goal": {
                "budget_kl": 0.01,
                "max_bytes": None,
                "rungs": None,
                "num_points": None,
            },
            "device": "cpu",
            "matmul_precision": "highest",
        }
    ]
    assert (card["plan"]["policy"], card["plan"]["price"]) == ("budget", PRICE)
    assert card["plan"]["budget_kl"] == 0.01
    assert card["blocks"]["alias"] == 2
    assert card["bytes"]["unique"] < card["bytes"]["logical"]
    job = priced.client.get("/models/jobs").json()["data"][0]
    assert (job["result"]["price"], job["result"]["budget_kl"]) == (PRICE, 0.01)
    assert job["result"]["seconds"]["tune"] > 0
    assert priced.chat("near").status_code == 200


def test_budget_too_small_for_any_sharing_keeps_everything(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    card = priced.onboard("near", models["near"], budget_kl=KL_UPPER - 0.001).json()
    assert card["blocks"]["alias"] == 0
    assert card["plan"]["price"]["kl_upper"] == 0.0


def test_what_was_measured_is_not_measured_again(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    priced.onboard("near", models["near"])
    assert priced.onboard("again", models["near"]).json()["plan"]["price"] == PRICE
    assert len(tunings(models["near"])) == 1
    seconds = priced.client.get("/models/jobs").json()["data"][0]["result"]["seconds"]
    assert [seconds[stage] for stage in ("hash", "scan", "tune")] == [0.0, 0.0, 0.0]
    priced.onboard("other-budget", models["near"], budget_kl=0.5)
    assert len(tunings(models["near"])) == 2
    priced.onboard("by-size", models["near"], max_bytes=60_000)
    assert tunings(models["near"])[-1]["goal"]["max_bytes"] == 60_000


def test_price_outlives_the_server(tmp_path: Path, models: dict[str, Path]) -> None:
    state = tmp_path / "state"
    with live_server(state, models=models, settings=BUDGET) as server:
        server.until_ready()
    with live_server(state, root=tmp_path, settings=BUDGET) as server:
        server.until_ready()
        assert server.client.get("/models/near").json()["plan"]["price"] == PRICE
        assert server.onboard("later", models["near"]).json()["plan"]["price"] == PRICE
    assert len(tunings(models["near"])) == 1


def test_another_calibration_text_is_measured_anew(
    priced: LiveServer, models: dict[str, Path], tmp_path: Path
) -> None:
    priced.onboard("near", models["near"])
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "To be, or not to be."}))
    settings = {"sharing": {"policy": "budget", "calibration": str(text)}}
    with live_server(tmp_path / "other", models=models, settings=settings) as server:
        server.until_ready()
    assert len(tunings(models["near"])) == 2


MEDIUM: dict[str, dict[str, object]] = {**BUDGET, "engine": {"matmul_precision": "medium"}}


def test_price_of_another_precision_is_measured_anew(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    state, near = tmp_path / "state", models["near"]
    with live_server(state, models={"base": models["base"]}, root=tmp_path,
                     settings=BUDGET) as server:  # fmt: skip
        server.until_ready()
        server.onboard("near", near)
        server.onboard("exact", near, policy="exact")
    with live_server(state, root=tmp_path, settings=MEDIUM) as server:
        price = until_served(server, "near")["plan"]["price"]
        assert price == {**PRICE, "matmul_precision": "medium"}
        assert until_served(server, "exact")["plan"]["price"] is None
        again = server.client.post("/models/plan", json={"name": "dry", "source": str(near)})
        assert again.json()["price"]["matmul_precision"] == "medium"
        assert (
            len(server.client.get("/models/jobs").json()["data"]) == 4
        )  # near alone was onboarded again
    assert [entry["matmul_precision"] for entry in tunings(near)] == ["highest", "medium"]


def test_price_of_deltas_that_were_rounded_otherwise_is_measured_anew(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    near = residual(make_variant(tmp_path / "far", models["base"], scale=0.01, seed=2),
                    {str(KL): "int4:64"})  # fmt: skip
    models = {"base": models["base"], "aliased": models["near"], "compressed": near}
    with live_server(tmp_path / "state", models=models, settings=BUDGET) as server:
        server.until_ready()
    monkeypatch.setattr(pricing, "ENCODING", ENCODING + 1)
    monkeypatch.setattr(request, "ENCODING", ENCODING + 1)
    with live_server(tmp_path / "state", root=tmp_path, settings=BUDGET) as server:
        until_served(server, "compressed")
        jobs = server.client.get("/models/jobs").json()["data"]
    # What leans on no delta costs what it did.
    assert sorted(job["model"] for job in jobs) == ["aliased", "base", "compressed", "compressed"]
    assert (len(tunings(models["aliased"])), len(tunings(near))) == (1, 2)


def until_served(server: LiveServer, name: str) -> dict[str, Any]:
    def card() -> dict[str, Any]:
        found: dict[str, Any] = server.client.get(f"/models/{name}").json()
        return found

    server.until(lambda: card()["state"] == "ready")
    return card()


def test_gpu_is_priced_at_highest_whatever_the_setting(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    engine: dict[str, object] = {
        "memory_budget": 100 << 20, "device": "cuda", "matmul_precision": "medium",
    }  # fmt: skip
    settings = {**BUDGET, "engine": engine}
    with live_server(tmp_path / "s", models=models, settings=settings) as server:
        server.until_ready()
    [asked] = tunings(models["near"])
    assert (asked["device"], asked["matmul_precision"]) == ("cpu", "highest")


def with_another_template(path: Path) -> None:
    """Changes how a model reads dialogues, and none of what its fingerprint covers."""
    template = path / "chat_template.jinja"
    template.write_text(template.read_text() + "{# #}!")


def test_another_chat_template_is_measured_anew(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    before = priced.onboard("near", models["near"]).json()
    with_another_template(models["near"])
    after = priced.onboard("again", models["near"]).json()
    assert after["fingerprint"] == before["fingerprint"]
    assert len(tunings(models["near"])) == 2


def test_own_answers_are_measured_once_and_anew_for_other_prompts(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    settings: dict[str, dict[str, object]] = {
        "sharing": {"policy": "budget", "calibration": "self"}
    }
    with live_server(
        tmp_path / "s", models=models, root=tmp_path, settings=settings
    ) as server:  # fmt: skip
        server.until_ready()
        assert server.onboard("again", models["near"]).json()["plan"]["price"] == PRICE
        assert len(tunings(models["near"])) == 1
        with_another_template(models["near"])
        server.onboard("other", models["near"])
    assert len(tunings(models["near"])) == 2


def test_thresholds_beyond_their_budget_fail_the_job(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    options: dict[str, Any] = {"tau_cos": 0.9, "tau_frob": 0.1, "budget_kl": 0.005}
    error = refusal(priced.onboard("near", models["near"], **options), 400)
    assert (error["code"], error["param"]) == ("budget_exceeded", "budget_kl")
    assert "0.006" in error["message"]
    assert priced.client.get("/models/near").json()["state"] == "failed"
    [goal] = [entry["goal"] for entry in tunings(models["near"])]
    assert set(goal["rungs"].values()) == {"alias", "own"}
    within = priced.onboard("near", models["near"], **options | {"budget_kl": 0.006}).json()
    assert within["plan"]["price"] == PRICE
    assert (within["plan"]["tau_cos"], within["plan"]["policy"]) == (0.9, "thresholds")


def test_identical_model_needs_no_tuner(priced: LiveServer, models: dict[str, Path]) -> None:
    twin = make_variant(models["base"].parent / "twin", models["base"], scale={})
    card = priced.onboard("twin", twin).json()
    assert card["bytes"]["unique"] == 0
    assert (card["plan"]["price"]["kl"], card["plan"]["price"]["tokens"]) == (0.0, 0)
    assert tunings(twin) == []


def test_failing_tuner_fails_the_job_and_loads_nothing(
    priced: LiveServer, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINKER_TEST_TUNER_FAILS", "1")
    error = refusal(priced.onboard("near", models["near"]), 400)
    assert error["param"] == "calibration"
    assert not (models["near"] / "loads.log").exists()
    assert priced.metric('linker_admissions_total{outcome="failed"}') == 1


def test_dying_tuner_fails_the_job(tmp_path: Path, models: dict[str, Path]) -> None:
    dying = (sys.executable, "-c", "import os; os.abort()")
    with live_server(tmp_path / "s", models=models, tune_command=dying, settings=BUDGET) as server:
        server.until_ready()
        card = server.client.get("/models/near").json()
    assert (card["state"], card["error"]["code"]) == ("failed", "engine_failure")


def test_files_replaced_while_they_are_tuned_are_refused(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    blocker = models["near"] / BLOCKER
    blocker.touch()
    job = priced.onboard("near", models["near"], wait=False).json()
    priced.until(lambda: stage_of(priced, job) == "tuning")
    weights = models["base"] / "model.safetensors"
    copy = weights.with_suffix(".new")
    copy.write_bytes(weights.read_bytes())
    copy.rename(weights)
    blocker.unlink()
    assert until_job(priced, job["id"], "failed")["error"]["code"] == "bad_checkpoint"


def test_template_replaced_while_it_is_tuned_is_refused(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    blocker = models["near"] / BLOCKER
    blocker.touch()
    job = priced.onboard("near", models["near"], wait=False).json()
    priced.until(lambda: stage_of(priced, job) == "tuning")
    with_another_template(models["near"])
    blocker.unlink()
    assert until_job(priced, job["id"], "failed")["error"]["code"] == "bad_checkpoint"
    assert priced.onboard("near", models["near"]).status_code == 201  # now it is what it was
    assert len(tunings(models["near"])) == 2


def test_tuning_shows_in_the_job_and_holds_memory_meanwhile(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    free = 'linker_device_memory_bytes{device="cpu",state="free"}'
    before = priced.metric(free)
    blocker = models["near"] / BLOCKER
    blocker.touch()
    job = priced.onboard("near", models["near"], wait=False).json()
    priced.until(lambda: stage_of(priced, job) == "tuning")
    assert priced.client.get(f"/models/jobs/{job['id']}").json()["progress"] == {
        "done_bytes": 1, "total_bytes": 2, "bytes_per_second": None, "remaining_seconds": None,
    }  # fmt: skip
    held = before - priced.metric(free)
    assert held > 2 * (64 << 20)  # two chunks of logits at the least
    blocker.unlink()
    until_job(priced, job["id"], "succeeded")
    unique = priced.client.get("/models/near").json()["bytes"]["unique"]
    priced.until(lambda: priced.metric(free) == before - unique)


def stage_of(server: LiveServer, job: dict[str, Any]) -> Any:
    return server.client.get(f"/models/jobs/{job['id']}").json()["stage"]


def test_tuner_without_room_is_507_and_says_what_it_needs(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    settings: dict[str, dict[str, object]] = {**BUDGET, "engine": {"memory_budget": 100 << 20}}
    with live_server(tmp_path / "s", models={"base": models["base"]}, root=tmp_path,
                     settings=settings) as server:  # fmt: skip
        server.until_ready()
        error = refusal(server.onboard("near", models["near"]), 507)
    assert error["code"] == "insufficient_capacity"
    assert "bytes of device memory" in error["message"]


def test_tuner_without_room_on_the_gpu_runs_on_the_cpu(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    settings: dict[str, dict[str, object]] = {
        **BUDGET,
        "engine": {"memory_budget": 100 << 20, "device": "cuda"},
    }
    with live_server(tmp_path / "s", models=models, settings=settings) as server:
        server.until_ready()
        assert server.client.get("/models/near").json()["plan"]["price"] == PRICE
    assert [entry["device"] for entry in tunings(models["near"])] == ["cpu"]


def test_engine_death_while_tuning_is_waited_out(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    blocker = models["near"] / BLOCKER
    blocker.touch()
    job = priced.onboard("near", models["near"], wait=False).json()
    priced.until(lambda: stage_of(priced, job) == "tuning")
    first = priced.services.engine.pid
    priced.services.engine.kill()
    priced.until(lambda: priced.services.engine.pid not in (first, None))
    blocker.unlink()
    until_job(priced, job["id"], "succeeded")
    assert priced.chat("near").status_code == 200


def test_engine_death_while_tuning_on_its_gpu_starts_the_tuner_anew(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    settings: dict[str, dict[str, object]] = {**BUDGET, "engine": {"device": "cuda"}}
    with live_server(
        tmp_path / "s", models={"base": models["base"]}, root=tmp_path, limits=LIMITS,
        settings=settings,
    ) as server:  # fmt: skip
        server.until_ready()
        blocker = models["near"] / BLOCKER
        blocker.touch()
        job = server.onboard("near", models["near"], wait=False).json()
        server.until(lambda: stage_of(server, job) == "tuning")
        server.services.engine.kill()
        server.until(lambda: len(tunings(models["near"])) == 2)
        blocker.unlink()
        until_job(server, job["id"], "succeeded")
    assert [entry["device"] for entry in tunings(models["near"])] == ["cuda", "cuda"]


@pytest.mark.parametrize("damage", ["'{'", "'{}'", '\'{"blocks": [{}], "chosen": 3}\''])
def test_stored_scan_and_price_that_cannot_be_read_are_made_again(
    priced: LiveServer, models: dict[str, Path], damage: str
) -> None:
    priced.onboard("near", models["near"])
    with priced.services.registry._engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE tunings SET result = {damage}")
        connection.exec_driver_sql(f"UPDATE scans SET report = {damage}")
    assert priced.onboard("again", models["near"]).json()["plan"]["price"] == PRICE
    assert len(tunings(models["near"])) == 2
    assert priced.client.get("/models/jobs").json()["data"][0]["result"]["seconds"]["scan"] > 0


def test_tuner_hears_that_sequences_run(tmp_path: Path, models: dict[str, Path]) -> None:
    heard = tmp_path / "heard"
    listening = (
        "import sys; sys.stdin.readline(); open(sys.argv[1], 'w').write(sys.stdin.readline())"
    )
    command = (sys.executable, "-c", listening, str(heard))
    with live_server(
        tmp_path / "s", models={"base": models["base"]}, root=tmp_path, tune_command=command,
        settings=BUDGET,
    ) as server:  # fmt: skip
        server.until_ready()
        server.onboard("scanned", models["near"], policy="exact")  # a scan would hold back too
        body = {"model": "base", "prompt": [Fault.WAIT, 9], "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # kept: its end would be the stream's
            next(lines)
            server.onboard("near", models["near"])
    assert heard.read_text() == "busy\n"


def test_admissions_are_counted_and_timed_by_stage(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    def count(stage: str) -> float:
        return priced.metric(f'linker_admission_seconds_count{{stage="{stage}"}}')

    assert priced.metric('linker_admissions_total{outcome="cancelled"}') == 0
    before = {stage: count(stage) for stage in ("open", "hash", "scan", "tune", "ready")}
    assert before["tune"] == 0
    job = priced.onboard("near", models["near"], wait=False).json()
    until_job(priced, job["id"], "succeeded")
    assert {stage: count(stage) - before[stage] for stage in before} == dict.fromkeys(before, 1)
    assert priced.metric('linker_admissions_total{outcome="succeeded"}') == 2
    seconds = until_job(priced, job["id"], "succeeded")["result"]["seconds"]
    assert list(seconds) == ["open", "hash", "scan", "tune", "encode", "alias", "move", "ready"]
    assert seconds.pop("encode") == 0  # nothing is compressed
    assert all(spent > 0 for spent in seconds.values())
    assert (seconds["alias"], seconds["move"]) == (0.25, 0.5)  # as the engine says
    assert priced.metric('linker_admission_seconds_sum{stage="move"}') == 1.0
    priced.onboard("exact", models["near"], policy="exact")
    assert count("tune") == 1  # a skipped stage is not observed


def test_donor_is_timed_without_a_tuner(priced: LiveServer, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", layers=3)
    priced.onboard("other", other)
    seconds = priced.client.get("/models/jobs").json()["data"][0]["result"]["seconds"]
    assert seconds["tune"] == 0.0
    assert min(seconds[stage] for stage in ("open", "hash", "scan", "ready")) > 0


def test_prices_are_gauges_of_priced_models_until_they_are_deleted(
    priced: LiveServer, models: dict[str, Path]
) -> None:
    priced.onboard("near", models["near"])
    priced.onboard("unpriced", models["near"], policy="exact")
    assert priced.metric('linker_plan_kl_nats{model="near"}') == KL
    assert priced.metric('linker_plan_top1_agreement_ratio{model="near"}') == 1 - KL
    assert priced.metric('linker_plan_perplexity_ratio{model="near"}') == 1 + KL
    text = priced.client.get("/metrics").text
    assert 'linker_plan_kl_nats{model="unpriced"}' not in text
    assert 'linker_plan_kl_nats{model="base"}' not in text
    assert 'linker_block_cosine{block="0",model="unpriced"}' in text
    priced.client.delete("/models/near")
    assert 'model="near"' not in priced.client.get("/metrics").text
