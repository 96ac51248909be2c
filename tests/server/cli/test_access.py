"""Who may use what `linker serve` starts."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from linker_core.errors import InvalidRequestError
from server.registry.records import Role
from tests.server.cli.test_serve import serving
from tests.server.cli.test_serve_options import settings
from tests.server.keyed import give_key, revoke_key


def status_of(url: str, **headers: str) -> int:
    return httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_server_for_others_does_not_start_without_keys(tmp_path: Path, host: str) -> None:
    with serving(tmp_path, "--host", host) as served:
        assert served.ends() == 2
    [told] = [line for line in served.log if line.startswith("linker serve:")]
    assert "linker keys create" in told
    assert "--no-auth" in told


def test_a_revoked_key_starts_no_server_not_even_on_the_loopback(tmp_path: Path) -> None:
    revoke_key(tmp_path / "s", give_key(tmp_path / "s", Role.ADMIN))
    with serving(tmp_path) as served:
        assert served.ends() == 2
    assert any("not revoked" in line for line in served.log)


def test_server_for_others_starts_with_keys_and_wants_them(tmp_path: Path) -> None:
    key = give_key(tmp_path / "s", Role.ADMIN).key
    with serving(tmp_path, "--host", "0.0.0.0") as served:
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        assert status_of(url) == 401
        assert status_of(url, Authorization=f"Bearer {key}") == 200
        assert status_of(url, Authorization=f"Bearer {key}", Host="any.example") == 200
    assert not any("without a key" in line for line in served.log)
    assert not any("API keys now" in line for line in served.log)  # nothing has changed


def test_no_auth_opens_a_server_to_others_and_says_so(tmp_path: Path) -> None:
    give_key(tmp_path / "s", Role.ADMIN)
    with serving(tmp_path, "--host", "0.0.0.0", "--no-auth") as served:
        assert status_of(served.url.replace("0.0.0.0", "127.0.0.1")) == 200
    assert any("--no-auth: whoever reaches 0.0.0.0" in line for line in served.log)


def test_loopback_server_without_keys_is_open_and_says_so(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert status_of(served.url) == 200
        assert status_of(served.url, Host="evil.example") == 403
    assert any("no API keys: whoever is on this machine" in line for line in served.log)
    assert any("only hub: sources" in line for line in served.log)
    assert not any("Context impl" in line for line in served.log)


def test_the_command_that_the_log_names_makes_the_server_s_first_key(tmp_path: Path) -> None:
    config = tmp_path / "my config.yaml"
    config.write_text(f"storage: {{state: {tmp_path / 's'}}}\n")
    with serving(tmp_path, "--config", str(config)) as served:
        assert status_of(served.url) == 200
        [line] = [line for line in served.log if "no API keys" in line]
        command = shlex.split(line.split("`")[1].replace("NAME", "me"))
        module = [sys.executable, "-m", "server.cli.main", *command[1:]]
        made = subprocess.run(module, capture_output=True, text=True, check=True)
        served.until("/v1/models", lambda response: response.status_code == 401)
        assert status_of(served.url, Authorization=f"Bearer {made.stdout.strip()}") == 200
    assert any("there are API keys now" in line for line in served.log)
    assert command[-4:] == ["--config", str(config), "--state", str(tmp_path / "s")]


def test_server_without_an_operators_key_says_so(tmp_path: Path) -> None:
    give_key(tmp_path / "s", Role.METRICS)
    with serving(tmp_path) as served:
        assert status_of(served.url) == 401
    assert any("no key may manage models" in line for line in served.log)


def test_allowed_hosts_are_taken_from_flags_and_bind(tmp_path: Path) -> None:
    with serving(tmp_path, "--allowed-host", "models.example", "[fd00::1]") as served:
        assert status_of(served.url, Host="models.example:8000") == 200
        assert status_of(served.url, Host="other.example") == 403


@pytest.mark.parametrize("name", ["a b", "http://a", "a:80", "*", ""])
def test_allowed_host_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        settings("--allowed-host", name)
