"""Whether a server and its state directory are sound: rows, files, bytes, processes."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linker_core.sharing.plan import Policy, SharePlan
from linker_core.sharing.rungs import Rung
from server.onboarding.deltas import delta_name
from server.onboarding.hub.source import HubSource, is_hub_source
from tests.server.crash.servers import ServerProcess

_FILES = {"lock", "registry.sqlite3", "registry.sqlite3-shm", "registry.sqlite3-wal"}
_HUB = {"trees", "records", "unfinished", "revisions.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the registry's file says of a model."""

    name: str
    source: str
    state: str
    donor: str | None
    fingerprint: str | None
    plan: Mapping[str, Any] | None


def check_sound(server: ServerProcess, state: Path, *, budget_bytes: int) -> dict[str, Row]:
    """Waits until a server is at rest and asserts that all is well; returns its models' rows."""
    server.until_settled()
    rows = check_rows(state)
    check_files(state, rows)
    check_bytes(server, rows, budget_bytes=budget_bytes)
    return rows


def check_rows(state: Path) -> dict[str, Row]:
    """Asserts that the registry's file is whole and every row of it says how things ended."""
    address = f"file:{state / 'registry.sqlite3'}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=30)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        models = connection.execute(
            "SELECT name, source, state, donor, fingerprint, plan FROM models"
        ).fetchall()
        bases = {known for (known,) in connection.execute("SELECT fingerprint FROM bases")}
        jobs = connection.execute(
            "SELECT id, status, finished_at, error, result FROM jobs"
        ).fetchall()
    rows = {
        name: Row(
            name=name,
            source=source,
            state=kept,
            donor=donor,
            fingerprint=print_,
            plan=plan and json.loads(plan),
        )
        for name, source, kept, donor, print_, plan in models
    }
    for row in rows.values():
        assert row.state in ("ready", "unloaded", "failed"), row
        if row.state != "failed":
            assert row.plan is not None, row
            SharePlan.from_json(row.plan)
            assert row.donor is None or rows[row.donor].state != "failed", row
            _check_base(row, rows, bases)
    plans = [row.plan for row in rows.values() if row.plan is not None]
    assert bases <= {plan["donor_fingerprint"] for plan in plans}, "an orphan"
    for job, status, finished_at, error, result in jobs:
        assert status in ("succeeded", "failed", "cancelled"), (job, status)
        assert finished_at is not None, job
        assert (error in (None, "null")) == (status == "succeeded"), (job, status, error)
        assert (result in (None, "null")) == (status != "succeeded"), (job, status, result)
    return rows


def _check_base(row: Row, rows: Mapping[str, Row], bases: set[str]) -> None:
    """Asserts that a restart finds the checkpoint that a plan was made against."""
    assert row.plan is not None
    base = row.plan["donor_fingerprint"]
    if base is None:
        assert row.donor is None, row
        assert row.plan["variant_fingerprint"] == row.fingerprint, row
    elif base not in bases:
        assert row.donor is not None, row
        donor = rows[row.donor]
        assert donor.plan is not None, row
        assert (donor.fingerprint, donor.plan["donor_fingerprint"]) == (base, None), row


def check_files(state: Path, rows: Mapping[str, Row]) -> None:
    """Asserts that the state directory holds what its rows speak of, and nothing else."""
    assert {path.name for path in state.iterdir()} <= _FILES | {"deltas", "hub"}
    deltas = state / "deltas"
    kept = {folder.name for folder in deltas.iterdir()} if deltas.exists() else set[str]()
    assert kept <= set(_folders(rows.values().__iter__(), all_rows=True)), "an orphan"
    assert kept >= set(_folders(rows.values().__iter__(), all_rows=False)), "a folder is missing"
    for name in kept:
        inside = {path.name for path in (deltas / name).iterdir()}
        assert "delta.safetensors" in inside
        assert not any(entry.startswith(".") for entry in inside), inside
    _check_downloads(state / "hub", rows)


def _check_downloads(hub: Path, rows: Mapping[str, Row]) -> None:
    keys = {
        HubSource.parse(row.source).key: row.state != "failed"
        for row in rows.values()
        if is_hub_source(row.source)
    }
    records = {path.stem: json.loads(path.read_text()) for path in hub.glob("records/*")}
    assert records.keys() <= keys.keys(), "an orphan"
    assert records.keys() >= {key for key, is_needed in keys.items() if is_needed}
    assert {path.name for path in hub.glob("*")} <= _HUB, "an orphan"
    assert {path.name for path in hub.glob("trees/*")} == {r["tree"] for r in records.values()}
    for record in records.values():
        tree = hub / "trees" / record["tree"]
        found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tree.iterdir()}
        assert found == record["files"]
    assert {path.name for path in hub.glob("unfinished/*")} <= keys.keys() - records.keys()


def check_bytes(server: ServerProcess, rows: Mapping[str, Row], *, budget_bytes: int) -> None:
    """Asserts that the device holds what its models' plans say, and nothing else."""
    expected = sum(
        row.plan["unique_bytes"]
        for row in rows.values()
        if row.plan is not None and server.get(f"/models/{row.name}")["state"] == "ready"
    )

    # An engine that was killed may be on its way back.
    server.until(
        lambda: server.device_bytes().get("weights") == expected,
        what=f"{expected} bytes of weights",
    )

    def all_but_reserved() -> float:
        used = server.device_bytes()
        return sum(used.get(state, 0) for state in ("free", "weights", "kv"))

    server.until(lambda: all_but_reserved() == budget_bytes, what="the return of what was reserved")
    held = [
        float(line.rsplit(" ", 1)[1])
        for line in server.client.get("/metrics").text.splitlines()
        if line.startswith("linker_model_weight_bytes{") and 'kind="unique"' in line
    ]
    assert sum(held) == expected


def _folders(rows: Iterator[Row], *, all_rows: bool) -> Iterator[str]:
    for row in rows:
        if row.plan is None or row.plan["policy"] == Policy.DELTA:
            continue
        if set(row.plan["rungs"].values()) <= set(Rung):
            continue
        if all_rows or row.state != "failed":
            yield delta_name(row.plan)
