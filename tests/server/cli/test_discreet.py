from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from server.cli.discreet import DiscreetFormatter

SECRET = "what was asked"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What every logger below `server` and others write."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(DiscreetFormatter("%(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)


def fail() -> None:
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise ExceptionGroup(SECRET, [ValueError(SECRET)]) from error


@pytest.mark.parametrize("name", ["uvicorn.error", "asyncio", "server.gateway.streaming"])
def test_faults_of_answering_are_told_by_kind_and_place(log: io.StringIO, name: str) -> None:
    try:
        fail()
    except ExceptionGroup:
        logging.getLogger(name).exception("a fault")
    said = log.getvalue()
    assert SECRET not in said
    for part in ("a fault", "KeyError", "ExceptionGroup", "ValueError", "test_discreet.py", "fail"):
        assert part in said


def test_other_faults_are_told_in_full(log: io.StringIO) -> None:
    try:
        fail()
    except ExceptionGroup:
        logging.getLogger("server.onboarding").exception("a fault")
    assert SECRET in log.getvalue()


def test_tasks_that_nobody_waits_for_are_not_shown(log: io.StringIO) -> None:
    logging.getLogger("asyncio").error("Task failed\ntask: <Task exception=KeyError(%r)>", SECRET)
    assert log.getvalue() == "Task failed\n"
