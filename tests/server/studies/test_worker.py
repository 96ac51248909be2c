from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import BadCheckpointError, EngineFailureError, UnsupportedFormatError
from linker_core.pace import Spent
from server.registry.records import Json
from server.studies.files import Place, Places
from server.studies.worker import Listener, Order, StudyWorker

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


@pytest.mark.parametrize(
    ("changed", "whose"),
    [({"base": ONE.identity}, "the base"), ({"variants": {"one": BASE.identity}}, "one")],
)
def test_other_files_than_were_validated_are_not_studied(
    changed: dict[str, Any], whose: str
) -> None:
    with pytest.raises(BadCheckpointError, match=f"{whose}: its files are not the ones"):
        run(opened(**changed), RECORD)


def test_error_of_the_worker_is_raised_as_it_was() -> None:
    error = {"code": "unsupported_format", "message": "one: a pickle", "param": None}
    with pytest.raises(UnsupportedFormatError, match="one: a pickle"):
        run({"error": error})
