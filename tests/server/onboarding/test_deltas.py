"""Variants in few bits: encoded at admission, found again at a restart, swept once unused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from linker_core.sharing.delta_layout import DELTA_FILE
from server.onboarding import deltas, encoder
from tests.server.fake_engine import Fault
from tests.server.held_encoder import BLOCKER, HELD_ENCODER, tasks
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.family import delta_folders, loads, residual, until_job

INT2 = {"0.004": "int2:64"}
BUDGET: dict[str, dict[str, object]] = {"sharing": {"policy": "budget"}}


@pytest.fixture
def near(models: dict[str, Path]) -> Path:
    return residual(models["near"], INT2)


def serving(
    tmp_path: Path, models: dict[str, Path], **more: Any
) -> AbstractContextManager[LiveServer]:
    """A server of `base` that stores variants as the pretended tuner says."""
    options: dict[str, Any] = {
        "models": {"base": models["base"]}, "root": tmp_path, "limits": LIMITS,
        "settings": BUDGET, "encode_command": HELD_ENCODER,
    }  # fmt: skip
    return live_server(tmp_path / "state", **(options | more))


@pytest.fixture
def live(tmp_path: Path, models: dict[str, Path]) -> Iterator[LiveServer]:
    with serving(tmp_path, models) as server:
        server.until_ready()
        yield server


def test_residual_plan_is_loaded_from_the_folder_that_was_encoded(
    live: LiveServer, tmp_path: Path, models: dict[str, Path], near: Path
) -> None:
    card = live.onboard("near", near).json()
    [folder] = delta_folders(tmp_path / "state")
    assert (folder / DELTA_FILE).is_file()
    assert (loads(folder), loads(near)) == (["near"], [])
    assert card["blocks"] == {"alias": 0, "residual": 2, "own": 0, "total": 2}
    held = card["plan"]["rung_bytes"]
    assert set(held) == {"int2", "own"}
    assert sum(held.values()) == card["bytes"]["unique"]
    assert live.metric('linker_model_rung_bytes{model="near",rung="int2"}') == held["int2"]
    assert live.metric('linker_model_blocks{model="near",rung="residual"}') == 2
    bits = card["plan"]["bits_per_weight"]
    assert live.metric('linker_model_bits_per_weight{model="near"}') == bits
    job = live.client.get("/models/jobs").json()["data"][0]
    assert job["result"]["seconds"]["encode"] > 0
    assert live.chat("near").status_code == 200
    assert tasks(models["base"]) == ["encode"]


def test_same_plan_is_encoded_once(
    live: LiveServer, tmp_path: Path, models: dict[str, Path], near: Path
) -> None:
    live.onboard("near", near)
    live.onboard("again", near)
    [folder] = delta_folders(tmp_path / "state")
    assert loads(folder) == ["near", "again"]
    assert tasks(models["base"]) == ["encode"]
    live.client.delete("/models/near")
    assert delta_folders(tmp_path / "state") == [folder]  # the other one's too
    live.client.delete("/models/again")
    assert delta_folders(tmp_path / "state") == []
    assert 'linker_model_rung_bytes{model="near"' not in live.client.get("/metrics").text


def test_folder_of_deltas_rounded_otherwise_is_not_taken_for_one_of_these(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: dict[str, Path], near: Path
) -> None:
    with serving(tmp_path, models) as server:
        server.until_ready()
        server.onboard("near", near)
    [before] = delta_folders(tmp_path / "state")
    monkeypatch.setattr(deltas, "ENCODING", -1)
    with serving(tmp_path, models) as server:
        server.until_ready()
        [after] = delta_folders(tmp_path / "state")
        assert after != before
        assert loads(after) == ["near"]
    assert tasks(models["base"]) == ["encode", "encode"]


def test_encoding_shows_in_the_job(live: LiveServer, models: dict[str, Path], near: Path) -> None:
    (models["base"] / BLOCKER).touch()
    job = live.onboard("near", near, wait=False).json()
    live.until(lambda: tasks(models["base"]) == ["encode"])
    live.until(lambda: progress(live, job)["done_bytes"] == 1)
    assert live.client.get(f"/models/jobs/{job['id']}").json()["stage"] == "loading"
    (models["base"] / BLOCKER).unlink()
    until_job(live, job["id"], "succeeded")


def progress(server: LiveServer, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get(f"/models/jobs/{job['id']}").json()["progress"]
    return found


def flip(folder: Path) -> None:
    """Changes the last weight's last bit."""
    data = bytearray((folder / DELTA_FILE).read_bytes())
    data[-1] ^= 1
    (folder / DELTA_FILE).write_bytes(data)


def cut(folder: Path) -> None:
    data = (folder / DELTA_FILE).read_bytes()
    (folder / DELTA_FILE).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "asked"),
    [
        (None, ["verify"]),
        (flip, ["verify", "encode"]),
        (cut, ["encode"]),
        (shutil.rmtree, ["encode"]),
    ],
    ids=["sound", "flipped", "cut", "missing"],
)
def test_restart_reads_a_delta_and_encodes_a_damaged_one_anew(
    tmp_path: Path,
    models: dict[str, Path],
    near: Path,
    damage: Callable[[Path], None] | None,
    asked: list[str],
) -> None:
    with serving(tmp_path, models) as server:
        server.until_ready()
        server.onboard("near", near)
    [folder] = delta_folders(tmp_path / "state")
    before = (folder / DELTA_FILE).read_bytes()
    if damage is not None:
        damage(folder)
    (tmp_path / "state" / "deltas" / ("0" * 64)).mkdir()  # of nobody
    (tmp_path / "state" / "deltas" / ".incomplete-1").mkdir()
    with serving(tmp_path, models) as server:
        server.until_ready()
        assert server.client.get("/models/near").json()["state"] == "ready"
        assert server.chat("near").status_code == 200
    assert delta_folders(tmp_path / "state") == [folder]
    assert (folder / DELTA_FILE).read_bytes() == before
    assert tasks(models["base"]) == ["encode", *asked]
    assert loads(folder)[-1] == "near"


def test_engine_restart_reads_a_sound_delta_no_more(
    live: LiveServer, models: dict[str, Path], near: Path
) -> None:
    live.onboard("near", near)
    first = live.services.engine.pid
    live.services.engine.kill()
    live.until(lambda: live.services.engine.pid not in (first, None))
    live.until_ready()
    assert live.chat("near").status_code == 200
    assert tasks(models["base"]) == ["encode"]


def test_server_that_stops_while_it_encodes_finishes_at_the_next_start(
    tmp_path: Path, models: dict[str, Path], near: Path
) -> None:
    (models["base"] / BLOCKER).touch()
    with serving(tmp_path, models) as server:
        server.until_ready()
        job = server.onboard("near", near, wait=False).json()
        server.until(lambda: tasks(models["base"]) == ["encode"])
        (tmp_path / "state" / "deltas" / "unfinished-1").mkdir()  # as kill -9 would leave it
    (models["base"] / BLOCKER).unlink()
    with serving(tmp_path, models) as server:
        until_job(server, job["id"], "succeeded")
        assert server.chat("near").status_code == 200
    [folder] = delta_folders(tmp_path / "state")
    assert (folder / DELTA_FILE).is_file()


def test_full_disk_is_507_and_leaves_nothing(
    tmp_path: Path, models: dict[str, Path], near: Path
) -> None:
    # No file may become larger than 8 KiB, as on a disk without room.
    full = ("bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *HELD_ENCODER)
    with serving(tmp_path, models, encode_command=full) as server:
        server.until_ready()
        response = server.onboard("near", near)
        assert response.status_code == 507
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("insufficient_capacity", None)
        assert str(tmp_path) not in error["message"]
        assert server.client.get("/models/near").json()["state"] == "failed"
        assert server.chat("base").status_code == 200
        assert delta_folders(tmp_path / "state") == []


def test_killed_encoder_fails_the_job_and_leaves_nothing(
    tmp_path: Path, models: dict[str, Path], near: Path
) -> None:
    dying = ("bash", "-c", "kill -9 $$")
    with serving(tmp_path, models, encode_command=dying) as server:
        server.until_ready()
        assert server.onboard("near", near).status_code == 507
        assert server.client.get("/models/near").json()["state"] == "failed"
        assert server.chat("base").status_code == 200
    with serving(tmp_path, models) as server:
        server.until_ready()
        assert server.onboard("near", near).status_code == 201  # the price is known already
    assert len(delta_folders(tmp_path / "state")) == 1


def test_files_replaced_while_they_are_encoded_are_refused(
    live: LiveServer, tmp_path: Path, models: dict[str, Path], near: Path
) -> None:
    (models["base"] / BLOCKER).touch()
    job = live.onboard("near", near, wait=False).json()
    live.until(lambda: tasks(models["base"]) == ["encode"])
    weights = near / "model.safetensors"
    copy = weights.with_suffix(".new")
    copy.write_bytes(weights.read_bytes())
    copy.rename(weights)
    (models["base"] / BLOCKER).unlink()
    assert until_job(live, job["id"], "failed")["error"]["code"] == "bad_checkpoint"
    assert delta_folders(tmp_path / "state") == []
    assert loads(near) == []


def test_encoder_hears_that_sequences_run(
    tmp_path: Path, models: dict[str, Path], near: Path
) -> None:
    heard = tmp_path / "heard"
    listening = (
        "import sys; sys.stdin.readline(); open(sys.argv[1], 'w').write(sys.stdin.readline())"
    )
    command = (sys.executable, "-c", listening, str(heard))
    with serving(tmp_path, models, encode_command=command) as server:
        server.until_ready()
        body = {"model": "base", "prompt": [Fault.WAIT, 9], "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # kept: its end would be the stream's
            next(lines)
            server.onboard("near", near)
    assert heard.read_text() == "busy\n"


def test_encoder_is_lent_memory_while_it_runs(
    live: LiveServer, models: dict[str, Path], near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 48 << 20
    monkeypatch.setattr(encoder, "encoding_bytes", lambda *_: needed)
    free = 'linker_device_memory_bytes{device="cpu",state="free"}'
    before = live.metric(free)
    (models["base"] / BLOCKER).touch()
    job = live.onboard("near", near, wait=False).json()
    live.until(lambda: tasks(models["base"]) == ["encode"])
    live.until(lambda: live.metric(free) == before - needed)
    (models["base"] / BLOCKER).unlink()
    until_job(live, job["id"], "succeeded")
    unique = live.client.get("/models/near").json()["bytes"]["unique"]
    live.until(lambda: live.metric(free) == before - unique)


def test_encoder_without_room_is_507_and_says_what_it_needs(
    live: LiveServer, tmp_path: Path, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "encoding_bytes", lambda *_: 1 << 50)
    response = live.onboard("near", near)
    assert response.status_code == 507, response.text
    error = response.json()["error"]
    assert error["code"] == "insufficient_capacity"
    assert f"{1 << 50} bytes of device memory" in error["message"]
    assert delta_folders(tmp_path / "state") == []
