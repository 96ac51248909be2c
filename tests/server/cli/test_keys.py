from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.cli import main
from server.registry.keys import MAX_KEYS, digest_of, make_key
from server.registry.records import KeyRecord, Role
from server.registry.store import Registry
from tests.server.keyed import client_of, registry_url
from tests.server.live import live_server
from tests.server.postgres import Cluster

Run = tuple[int, str, str]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def keys(capsys: pytest.CaptureFixture[str], state: Path, *arguments: str) -> Run:
    capsys.readouterr()
    status = main.main(["keys", *arguments, "--state", str(state)])
    said = capsys.readouterr()
    return status, said.out, said.err


def rows(state: Path) -> list[KeyRecord]:
    registry = Registry.open_beside(registry_url(state))
    found = registry.api_keys()
    registry.close()
    return found


def test_create_prints_the_key_and_nothing_else(
    capsys: pytest.CaptureFixture[str], state: Path
) -> None:
    limits = ("--requests-per-minute", "3", "--tokens-per-minute", "5", "--max-parallel", "7")
    status, said, told = keys(capsys, state, "create", "me", "--role", "admin", *limits)
    [row] = rows(state)
    assert status == 0
    assert digest_of(said.rstrip("\n")) == row.digest
    assert (row.name, row.role) == ("me", Role.ADMIN)
    assert (row.requests_per_minute, row.tokens_per_minute, row.max_parallel) == (3, 5, 7)
    assert said.strip() not in told


def test_list_shows_everything_but_the_key(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    _, key, _ = keys(capsys, state, "create", "me", "--max-parallel", "7")
    keys(capsys, state, "create", "you", "--role", "metrics")
    keys(capsys, state, "revoke", "you")
    _, said, _ = keys(capsys, state, "list")
    head, me, you = said.splitlines()
    assert head.split()[:3] == ["ID", "NAME", "ROLE"]
    assert re.match(r"key_\w{12}  me +client +sk-linker-.{4}… +- +- +7 +\d{4}-.*-$", me)
    assert re.match(r"key_\w{12}  you +metrics .*\d{4}-\d\d-\d\d \d\d:\d\d$", you)
    assert key.strip() not in said


def test_revoke_takes_a_name_or_an_id(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    for name in ("a", "b"):
        keys(capsys, state, "create", name)
    assert keys(capsys, state, "revoke", "a")[0] == 0
    assert keys(capsys, state, "revoke", rows(state)[1].id)[0] == 0
    assert all(row.revoked_at for row in rows(state))
    status, _, told = keys(capsys, state, "revoke", "a")
    assert (status, "no such key" in told) == (2, True)


def test_a_name_is_of_one_good_key(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    keys(capsys, state, "create", "a")
    status, said, told = keys(capsys, state, "create", "a")
    assert (status, said, "revoke it first" in told) == (2, "", True)
    keys(capsys, state, "revoke", "a")
    assert keys(capsys, state, "create", "a")[0] == 0


def test_bad_names_and_limits_are_refused_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], state: Path
) -> None:
    assert keys(capsys, state, "create", "a/b")[0] == 2
    assert keys(capsys, state, "create", "a", "--max-parallel", "0")[0] == 2
    assert rows(state) == []


def test_what_reads_keys_makes_no_registry(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    for arguments in (("list",), ("revoke", "a")):
        status, _, told = keys(capsys, state, *arguments)
        assert (status, "There is no registry" in told, str(state) in told) == (2, True, True)
        assert not state.exists()


def test_create_says_which_registry_it_wrote_to_and_whether_that_is_new(
    capsys: pytest.CaptureFixture[str], state: Path
) -> None:
    where = f"registry sqlite:///{state / 'registry.sqlite3'}"
    assert f"in the new {where}" in keys(capsys, state, "create", "a")[2]
    assert f"in the {where}" in keys(capsys, state, "create", "b")[2]


def test_first_key_says_that_it_closes_the_server(
    capsys: pytest.CaptureFixture[str], state: Path
) -> None:
    assert "every request" in keys(capsys, state, "create", "a", "--role", "admin")[2]
    keys(capsys, state, "revoke", "a")
    # A revoked one has closed it already.
    assert "every request" not in keys(capsys, state, "create", "b", "--role", "metrics")[2]


@pytest.mark.parametrize("role", list(Role))
def test_first_key_that_is_no_admins_says_how_to_get_in(
    capsys: pytest.CaptureFixture[str], state: Path, role: Role
) -> None:
    told = keys(capsys, state, "create", "a", "--role", role.value)[2]
    [said] = [line for line in told.splitlines() if "every request" in line]
    assert ("--role admin" in said) == (role is not Role.ADMIN)


def test_file_gets_the_key_once_for_its_owner_alone(
    capsys: pytest.CaptureFixture[str], state: Path, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    create = ("create", "a", "--role", "metrics", "--file", str(file))
    assert keys(capsys, state, *create)[:2] == (0, "")
    assert file.stat().st_mode & 0o777 == 0o600
    first = file.read_text()
    assert digest_of(first.strip()) == rows(state)[0].digest
    assert keys(capsys, state, *create)[0] == 0
    assert file.read_text() == first
    file.write_text("another")
    status, _, told = keys(capsys, state, *create)
    old, new = rows(state)
    assert (status, f"revoked {old.id} (a)\n" in told) == (0, True)
    assert old.revoked_at is not None
    assert digest_of(file.read_text().strip()) == new.digest
    assert [path.name for path in tmp_path.iterdir() if path != state] == ["key"]


def test_file_that_cannot_be_written_makes_no_key(
    capsys: pytest.CaptureFixture[str], state: Path, tmp_path: Path
) -> None:
    file = tmp_path / "nowhere" / "key"
    status, _, told = keys(capsys, state, "create", "a", "--file", str(file))
    assert (status, "cannot be written" in told) == (2, True)
    assert rows(state) == []


def test_there_are_only_so_many_good_keys(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    registry = Registry.open_beside(registry_url(state))
    made = [make_key(f"k{n}", Role.CLIENT, created_at=float(n)).record for n in range(MAX_KEYS)]
    registry.save(*made)
    registry.close()
    status, _, told = keys(capsys, state, "create", "one-more")
    assert (status, "revoke some" in told) == (2, True)
    keys(capsys, state, "revoke", "k7")
    assert keys(capsys, state, "create", "one-more")[0] == 0


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_running_server_takes_keys_that_the_command_makes(
    capsys: pytest.CaptureFixture[str],
    state: Path,
    tmp_path: Path,
    kind: str,
    request: pytest.FixtureRequest,
) -> None:
    settings: dict[str, dict[str, object]] = {}
    config = tmp_path / "config.yaml"
    config.write_text("{}\n")
    if kind == "postgresql":
        cluster: Cluster = request.getfixturevalue("cluster")
        url = cluster.new_database().render_as_string(hide_password=False)
        settings = {"storage": {"state": state, "registry_url": url}}
        config.write_text(f"storage: {{registry_url: '{url}'}}\n")
    with live_server(state, settings=settings) as live:
        create = ("create", "me", "--role", "admin", "--config", str(config))
        status, key, _ = keys(capsys, state, *create)
        assert status == 0
        with client_of(live, key.strip()) as client, client_of(live, None) as stranger:
            live.until(lambda: stranger.get("/models").status_code == 401)
            assert client.get("/models").status_code == 200
            keys(capsys, state, "revoke", "me", "--config", str(config))
            live.until(lambda: client.get("/models").status_code == 401)
