from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    InsufficientCapacityError,
    UnsupportedFormatError,
)
from linker_core.pace import Spent
from linker_core.weights.checkpoint import Checkpoint
from server.registry.records import Json
from server.studies.files import Place, Places, UnfitError
from server.studies.worker import Listener, Order, StudyWorker
from tests.tiny import make_checkpoint

BASE = Place(path=Path("/models/base"), identity=(("model.safetensors", 1, 2, 3, 4, 5),))
ONE = Place(path=Path("/models/one"), identity=(("model.safetensors", 1, 3, 3, 4, 5),))
DONE = (b'{"name": "t0"}', b'{"name": "t9"}')
OPENED = {"opened": {"base": BASE.identity, "variants": {"one": ONE.identity}, "num_tensors": 2}}
RECORD = {"record": {"name": "t1", "pc1": 0.5}, "spent": [1, 2, 3, 4]}
PRELUDE = """
import json, sys, time
request = sys.stdin.readline()
def say(*lines):
    for line in lines: print(line, flush=True)
"""


class Heard:
    """What a worker said."""

    def __init__(self) -> None:
        self.num_tensors: list[int] = []
        self.records: dict[str, Json] = {}
        self.spent: list[Spent] = []
        self.listener = Listener(
            on_opened=self.num_tensors.append,
            on_record=self.records.__setitem__,
            on_spent=self.spent.append,
        )


def order() -> Order:
    places = Places(base=BASE, variants={"one": ONE})
    return Order(base_name="base", places=places, done=deque(DONE))


def run(*messages: object, script: str = "") -> tuple[Json, Heard]:
    lines = ", ".join(repr(json.dumps(message)) for message in messages)
    code = f"{PRELUDE}say({lines})\n{script or 'time.sleep(600)'}"
    worker, heard = StudyWorker((sys.executable, "-c", code)), Heard()
    return asyncio.run(worker.run(order(), heard.listener)), heard


def test_request_has_what_a_worker_needs() -> None:
    result, _ = run(OPENED, script="say('{\"result\": ' + request.strip() + '}')")
    assert result == {
        "base": {"name": "base", "path": "/models/base"},
        "variants": {"one": "/models/one"},
        "num_done": 2,
        "seed": 0,
    }


def test_records_go_in_line_by_line_and_are_let_go() -> None:
    asked = order()
    code = (
        f"{PRELUDE}say({json.dumps(OPENED)!r})\n"
        "lines = [json.loads(sys.stdin.readline()) for _ in range(2)]\n"
        "say(json.dumps({'result': {'lines': lines}}))"
    )
    worker = StudyWorker((sys.executable, "-c", code))
    found = asyncio.run(worker.run(asked, Heard().listener))
    assert found == {"lines": [{"name": "t0"}, {"name": "t9"}]}
    assert not asked.done


def test_worker_hears_whether_sequences_run() -> None:
    code = (
        f"{PRELUDE}say({json.dumps(OPENED)!r})\n"
        "lines = [sys.stdin.readline() for _ in range(3)]\n"
        "say(json.dumps({'result': {'told': lines[-1]}}))"
    )
    worker = StudyWorker((sys.executable, "-c", code), busy=lambda: True)
    assert asyncio.run(worker.run(order(), Heard().listener)) == {"told": "busy\n"}


@pytest.mark.parametrize(("set_by_user", "expected"), [(None, "1"), ("4", "4")])
def test_linear_algebra_has_one_thread_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, set_by_user: str | None, expected: str
) -> None:
    if set_by_user is None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", set_by_user)
    threads = "__import__('os').environ['OPENBLAS_NUM_THREADS']"
    result, _ = run(OPENED, script=f"say(json.dumps({{'result': {{'threads': {threads}}}}}))")
    assert result == {"threads": expected}


def test_records_come_before_the_summary() -> None:
    result, heard = run(OPENED, RECORD, {"result": {"num_tensors": 2}})
    assert result == {"num_tensors": 2}
    assert heard.num_tensors == [2]
    assert heard.records == {"t1": {"name": "t1", "pc1": 0.5}}
    assert heard.spent == [Spent(1.0, 2.0, 3.0, 4.0)]


def opened(**changes: Any) -> dict[str, Any]:
    return {"opened": {**OPENED["opened"], **changes}}


@pytest.mark.parametrize(
    "messages",
    [
        (RECORD,),
        ({"result": {}},),
        (OPENED, {"result": [1]}),
        (OPENED, {"result": {"pc1": float("nan")}}),
        (OPENED, {"record": {"name": "t1", "pc1": float("inf")}, "spent": [0, 0, 0, 0]}),
        (OPENED, {"record": {"name": 7}, "spent": [0, 0, 0, 0]}),
        (OPENED, {"record": {"pc1": 1}, "spent": [0, 0, 0, 0]}),
        (OPENED, {"record": {"name": "t1"}}),
        (OPENED, {"record": {"name": "t1"}, "spent": [0, 0, 0, 0, 0]}),
        (OPENED, {"record": {"name": "t1"}, "spent": ["much", 0, 0, 0]}),
        (OPENED, {"news": 1}),
        (OPENED, 3),
        ({"opened": None},),
        (opened(num_tensors=0),),
        (opened(num_tensors="2"),),
        (opened(variants={}),),
        (opened(variants={"one": ONE.identity, "two": ONE.identity}),),
        (opened(base=[["short"]]),),
    ],
)
def test_worker_that_is_not_understood_is_ended(messages: tuple[object, ...]) -> None:
    with pytest.raises(EngineFailureError, match="a fault of the server"):
        run(*messages)


def test_base_of_other_files_than_were_validated_is_not_studied() -> None:
    with pytest.raises(BadCheckpointError, match="the base: its files are not the ones"):
        run(opened(base=ONE.identity), RECORD)


def test_variant_of_other_files_than_were_validated_is_named() -> None:
    with pytest.raises(UnfitError) as caught:
        run(opened(variants={"one": BASE.identity}), RECORD)
    assert caught.value.errors["one"].message.startswith("one: its files are not the ones")


@pytest.mark.parametrize("param", [None, "base", "variants.two", "tensors"])
def test_error_of_no_variant_is_raised_as_it_was(param: str | None) -> None:
    error = {"code": "unsupported_format", "message": "the base: a pickle", "param": param}
    with pytest.raises(UnsupportedFormatError, match="the base: a pickle") as caught:
        run({"error": error})
    assert caught.value.param is None


def test_error_of_a_variant_says_whose_it_is() -> None:
    error = {"code": "bad_checkpoint", "message": "one: cut off", "param": "variants.one"}
    with pytest.raises(UnfitError) as caught:
        run(OPENED, RECORD, {"error": error})
    assert caught.value.errors["one"].to_record() == error | {"param": None}


def test_shortage_over_the_files_of_a_variant_is_not_its_fault() -> None:
    said = "one: too many files are open"
    error = {"code": "insufficient_capacity", "message": said, "param": "variants.one"}
    with pytest.raises(InsufficientCapacityError, match=said):
        run({"error": error})


def ended_by_a_file_that_was_cut_short(tmp_path: Path, *changed: str) -> None:
    """Runs a worker that dies of such a file, and says nothing."""
    places = {name: placed(tmp_path / name) for name in ("base", "one", "two")}
    for name in changed:
        os.truncate(tmp_path / name / "model.safetensors", 8)
    variants = {name: places[name] for name in ("one", "two")}
    order = Order(
        base_name="base", places=Places(base=places["base"], variants=variants), done=deque()
    )
    code = "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 7)"
    asyncio.run(StudyWorker((sys.executable, "-c", code)).run(order, Heard().listener))


def placed(path: Path) -> Place:
    with Checkpoint.open(make_checkpoint(path)) as checkpoint:
        return Place(path=path, identity=checkpoint.identity)


def test_file_that_was_cut_short_is_traced_to_its_variant(tmp_path: Path) -> None:
    with pytest.raises(UnfitError) as caught:
        ended_by_a_file_that_was_cut_short(tmp_path, "two")
    [(name, error)] = caught.value.errors.items()
    assert name == "two"
    assert error.message.startswith("two: its files are not the ones")


def test_file_of_the_base_that_was_cut_short_is_nobody_elses_fault(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpointError, match="the base: its files are not the ones"):
        ended_by_a_file_that_was_cut_short(tmp_path, "base", "two")


def test_file_that_could_not_be_read_and_has_not_changed_is_nobodys(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpointError, match="could not be read to its end"):
        ended_by_a_file_that_was_cut_short(tmp_path)
