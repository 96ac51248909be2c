from __future__ import annotations

import itertools
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import IntegrityError, StatementError

from linker_core.errors import ConflictError, NotReadyError
from server.registry import store
from server.registry.records import (
    BaseRecord,
    JobStatus,
    ModelState,
    ReplayRecord,
)
from server.registry.store import MAX_TUNINGS_PER_PAIR, Registry
from tests.server.registry.rows import JOB, MODEL


def test_records_come_back_as_they_were_saved(registry: Registry) -> None:
    registry.save(MODEL, JOB)
    assert registry.model("acme/chat") == MODEL
    assert registry.job("job-1") == JOB


def test_records_survive_a_reopening(url: URL) -> None:
    first = Registry.open(url)
    first.save(MODEL)
    first.close()
    second = Registry.open(url)
    assert second.models() == [MODEL]
    second.close()


def test_saving_twice_replaces(registry: Registry) -> None:
    registry.save(MODEL)
    changed = replace(MODEL, state=ModelState.FAILED, error={"code": "x"})
    registry.save(changed)
    assert registry.models() == [changed]


def test_models_are_in_order_of_position(registry: Registry) -> None:
    registry.save(replace(MODEL, name="b", position=2), replace(MODEL, name="a", position=3), MODEL)
    assert [model.name for model in registry.models()] == ["acme/chat", "b", "a"]


def test_unknown_names_give_none(registry: Registry) -> None:
    assert registry.model("x") is None
    assert registry.job("x") is None
    assert registry.scan("x", "y") is None


def test_donor_with_dependants_cannot_be_deleted(registry: Registry) -> None:
    registry.save(MODEL)
    registry.save(replace(MODEL, name="near", donor="acme/chat", position=2))
    with pytest.raises(ConflictError):
        registry.delete_model("acme/chat")
    registry.delete_model("near")
    registry.delete_model("acme/chat")
    assert registry.models() == []


def test_replacing_moves_dependants_and_deletes_their_donor_at_once(registry: Registry) -> None:
    near = replace(MODEL, name="near", donor="acme/chat", position=2)
    far = replace(MODEL, name="far", donor="acme/chat", position=3)
    registry.save(MODEL, near, far)
    base = BaseRecord(fingerprint="ab", source="/models/chat")
    moved = replace(near, donor=None, family="near"), replace(far, donor="near", family="near")
    registry.replace(delete=["acme/chat"], save=[base, *moved])
    assert registry.models() == list(moved)
    assert registry.bases() == [base]


def test_replacing_frees_the_alias_of_what_it_deletes(registry: Registry) -> None:
    registry.save(replace(MODEL, alias="chat"))
    heir = replace(MODEL, name="heir", alias="chat", position=2)
    registry.replace(delete=["acme/chat"], save=[heir])
    assert registry.models() == [heir]


def test_alias_belongs_to_one_model(registry: Registry) -> None:
    registry.save(replace(MODEL, alias="chat"))
    with pytest.raises(IntegrityError):
        registry.save(replace(MODEL, name="other", alias="chat", position=2))


def test_dependants_may_be_saved_before_their_donor(registry: Registry) -> None:
    near = replace(MODEL, name="near", donor="acme/chat", position=2)
    registry.save(near, MODEL)
    assert registry.models() == [MODEL, near]


def test_replacing_that_strands_a_dependant_changes_nothing(registry: Registry) -> None:
    near = replace(MODEL, name="near", donor="acme/chat", position=2)
    far = replace(MODEL, name="far", donor="acme/chat", position=3)
    registry.save(MODEL, near, far)
    with pytest.raises(ConflictError, match="acme/chat: the donor of far; delete"):
        registry.replace(delete=["acme/chat"], save=[replace(near, donor=None)])
    assert registry.models() == [MODEL, near, far]


def test_bases_are_listed_until_they_are_deleted(registry: Registry) -> None:
    one, two = (BaseRecord(fingerprint=f, source=f"/models/{f}") for f in "ab")
    registry.save(two, one)
    assert registry.bases() == [one, two]
    registry.delete_base("a")
    registry.delete_base("never was")
    assert registry.bases() == [two]


def test_replays_are_found_by_key_until_they_are_too_old(registry: Registry) -> None:
    old, new = (
        ReplayRecord(key=key, digest="d", job="job-1", created_at=at)
        for key, at in (("k'1", 10.0), ("k2", 20.0))
    )
    registry.save(old, new)
    assert registry.replay("k'1") == old
    assert registry.replay("k") is None
    registry.forget_replays(before=20.0)
    assert registry.replay("k'1") is None
    assert registry.replay("k2") == new


def test_replays_are_bounded_and_the_newest_stay(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_REPLAYS", 3)
    for number in range(5):
        at = 100.0 + number
        registry.save(ReplayRecord(key=f"k{number}", digest="d", job="job-1", created_at=at))
    registry.forget_replays(before=0.0)
    known = [number for number in range(5) if registry.replay(f"k{number}") is not None]
    assert known == [2, 3, 4]


def test_records_of_one_save_are_stored_together_or_not_at_all(registry: Registry) -> None:
    orphan = replace(MODEL, name="orphan", donor="nobody")
    with pytest.raises(IntegrityError):
        registry.save(JOB, orphan)
    assert registry.job("job-1") is None


def test_names_are_parameters_never_sql(registry: Registry) -> None:
    registry.save(MODEL)
    assert registry.model("' OR 1=1 --") is None
    registry.delete_model("x'; DROP TABLE models; --")
    assert registry.models() == [MODEL]


def test_texts_that_no_database_keeps_are_not_found(registry: Registry) -> None:
    assert registry.job("job-1\0") is None
    assert registry.replay("k\0") is None


def test_numbers_that_are_none_are_not_stored(registry: Registry) -> None:
    with pytest.raises((StatementError, ValueError), match="JSON"):
        registry.save_scan("d", "v", {"epsilon": float("nan")})
    assert registry.scan("d", "v") is None


def test_json_keeps_every_character(registry: Registry) -> None:
    odd = {"name": "\0 \ud800 é 🙂 ' \\ \u2028"}
    registry.save(replace(MODEL, request=odd))
    assert registry.models()[0].request == odd


def test_scans_are_found_by_both_fingerprints(registry: Registry) -> None:
    registry.save_scan("d", "v", {"blocks": []})
    assert registry.scan("d", "v") == {"blocks": []}
    assert registry.scan("v", "d") is None


def test_scan_that_another_job_stores_meanwhile_is_kept(registry: Registry) -> None:
    racing = [True]

    def overtake(_connection: object, _cursor: object, statement: str, *_args: object) -> None:
        if statement.startswith("INSERT INTO scans") and racing.pop():
            racing.append(False)
            registry.save_scan("d", "v", {"blocks": [1]})

    event.listen(registry._engine, "before_cursor_execute", overtake)
    registry.save_scan("d", "v", {"blocks": [1]})
    assert registry.scan("d", "v") == {"blocks": [1]}


def test_tunings_are_found_by_both_fingerprints_and_their_key(registry: Registry) -> None:
    registry.save_tuning("d", "v", "k", {"seconds": 1.5})
    assert registry.tuning("d", "v", "k") == {"seconds": 1.5}
    assert registry.tuning("d", "v", "other") is None
    assert registry.tuning("v", "d", "k") is None
    registry.save_tuning("d", "v", "k", {"seconds": 2.5})
    assert registry.tuning("d", "v", "k") == {"seconds": 2.5}


def test_newest_tunings_of_a_pair_are_kept(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(store, "time", SimpleNamespace(time=lambda: float(next(clock))))
    registry.save_tuning("d", "other", "k", {"seconds": 0.5})
    keys = [str(number) for number in range(MAX_TUNINGS_PER_PAIR)]
    for key in (*keys, keys[0], "one more"):  # the first is measured again, so the second goes
        registry.save_tuning("d", "v", key, {"seconds": 1.5})
    left = [key for key in (*keys, "one more") if registry.tuning("d", "v", key)]
    assert left == [keys[0], *keys[2:], "one more"]
    assert registry.tuning("d", "other", "k") is not None


def test_jobs_of_a_model_are_listed_newest_first(registry: Registry) -> None:
    registry.save(JOB, replace(JOB, id="job-2", created_at=12.0), replace(JOB, id="x", model="y"))
    assert [job.id for job in registry.jobs(model="acme/chat", limit=9)] == ["job-2", "job-1"]


def test_touch_notes_the_last_use(registry: Registry) -> None:
    registry.save(MODEL)
    registry.touch({"acme/chat": 99.0, "gone": 1.0})
    model = registry.model("acme/chat")
    assert model is not None
    assert model.last_used_at == 99.0


def test_listing_of_jobs_is_limited_to_the_newest(registry: Registry) -> None:
    registry.save(*(replace(JOB, id=f"job-{n}", created_at=float(n)) for n in range(9)))
    assert [job.id for job in registry.jobs(limit=2)] == ["job-8", "job-7"]


def test_unfinished_jobs_are_found(registry: Registry) -> None:
    registry.save(JOB, replace(JOB, id="done", status=JobStatus.FAILED, finished_at=12.0))
    assert registry.unfinished_jobs() == [JOB]


def test_registry_that_cannot_be_written_says_so_until_it_can(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite3"
    registry = Registry.open(f"sqlite:///{path}")
    registry.probe()
    assert not registry.is_failing
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(NotReadyError):
            registry.probe()
        assert registry.is_failing
        assert registry.models() == []  # what can be read still is
        assert registry.is_failing
        other.rollback()
    registry.probe()
    assert not registry.is_failing
    registry.close()


def test_full_registry_is_failing_until_there_is_room(tmp_path: Path) -> None:
    registry = Registry.open(f"sqlite:///{tmp_path / 'r.sqlite3'}")

    @event.listens_for(registry._engine, "begin")
    def leave_room(connection: Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    pages = 1  # SQLite takes it for the present size
    with pytest.raises(NotReadyError):
        registry.save_scan("a", "b", {"text": "x" * 1_000_000})
    assert registry.is_failing
    pages = 1_000_000
    registry.probe()
    assert not registry.is_failing
    registry.close()
