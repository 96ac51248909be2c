"""What keys do on a running server: they come, go, bound their owners, and part what they ask."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from linker_core.errors import NotReadyError
from server.bridge.client import EngineClient
from server.registry.keys import digest_of
from server.registry.records import KeyRecord, Role
from tests.server.keyed import Keyed, client_of, give_key, revoke_key
from tests.server.live import LiveServer, live_server

# --- keys come and go ------------------------------------------------------------------------


def test_a_running_server_notices_keys_that_are_made_and_revoked(keyed: Keyed) -> None:
    live = keyed.live
    made = give_key(keyed.state, Role.CLIENT)
    with client_of(live, made.key) as client:
        live.until(lambda: client.get("/v1/models").status_code == 200)
        revoke_key(keyed.state, made)
        live.until(lambda: client.get("/v1/models").status_code == 401)
    with keyed.client(Role.CLIENT) as client:
        assert client.get("/v1/models").status_code == 200


def test_a_revoked_key_hears_of_no_more_changes(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.ADMIN)
    with client_of(keyed.live, made.key) as client, keyed.client(Role.ADMIN) as operator:
        keyed.live.until(lambda: client.get("/models").status_code == 200)
        with client.stream("GET", "/models/events") as response:
            events = (line for line in response.iter_lines() if line)
            assert "snapshot" in next(events)
            revoke_key(keyed.state, made)
            keyed.live.until(lambda: client.get("/models").status_code == 401)
            assert operator.patch("/models/base", json={"pin": True}).status_code == 200
            *statuses, error, done = events
            assert all('"type":"status"' in status for status in statuses)
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "invalid_api_key"
        assert done == "data: [DONE]"
        assert operator.patch("/models/base", json={"pin": False}).status_code == 200


def test_an_open_server_closes_with_its_first_key_and_stays_closed(tmp_path: Path) -> None:
    with live_server(tmp_path) as live, client_of(live, None) as client:
        assert client.get("/models").status_code == 200
        made = give_key(tmp_path, Role.ADMIN)
        live.until(lambda: client.get("/models").status_code == 401)
        with client_of(live, made.key) as owner:
            assert owner.get("/models").status_code == 200
            revoke_key(tmp_path, made)
            live.until(lambda: owner.get("/models").status_code == 401)
        assert client.get("/models").status_code == 401


def test_keys_are_good_while_the_registry_cannot_be_read(
    keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = keyed.live.services.keys
    reads: list[bool] = []

    def broken() -> list[KeyRecord]:
        reads.append(True)
        raise NotReadyError("The registry cannot be used at the moment; try again later.")

    monkeypatch.setattr(ring, "_read", broken)
    keyed.live.until(lambda: bool(reads))
    with keyed.client(Role.CLIENT) as client:
        assert client.get("/v1/models").status_code == 200


# --- limits ----------------------------------------------------------------------------------


def test_requests_of_a_key_are_bounded_with_when_to_come_again(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.CLIENT, requests_per_minute=3)
    with client_of(keyed.live, made.key) as client, keyed.client(Role.CLIENT) as other:
        keyed.live.until(lambda: client.get("/v1/models").status_code == 200)
        assert [client.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
        # What a key may not do counts as well.
        assert client.get("/models").status_code == 429
        refused = client.get("/v1/models")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert client.get("/health").status_code == 200
        assert other.get("/v1/models").status_code == 200


def test_tokens_of_a_key_are_bounded_and_others_go_on(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.CLIENT, tokens_per_minute=20)
    body = {"model": "base", "prompt": "abcd", "max_tokens": 16}
    with client_of(keyed.live, made.key) as client, keyed.client(Role.CLIENT) as other:
        keyed.live.until(lambda: client.get("/v1/models").status_code == 200)
        long = client.post("/v1/completions", json={**body, "prompt": "a" * 21})
        assert long.status_code == 400
        assert client.post("/v1/completions", json=body).status_code == 200
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert other.post("/v1/completions", json=body).status_code == 200


def test_parallel_answers_of_a_key_share_its_tokens(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.CLIENT, tokens_per_minute=100)
    body = {"model": "base", "prompt": "ab", "max_tokens": 60, "ignore_eos": True}

    def ask(client: httpx.Client) -> tuple[int, int]:
        response = client.post("/v1/completions", json=body)
        used = response.json()["usage"]["total_tokens"] if response.status_code == 200 else 0
        return response.status_code, used

    with client_of(keyed.live, made.key) as client, ThreadPoolExecutor(20) as threads:
        keyed.live.until(lambda: client.get("/v1/models").status_code == 200)
        answers = list(threads.map(ask, [client] * 20))
        assert {status for status, _ in answers} == {200, 429}
        assert 60 <= sum(used for _, used in answers) <= 100 + 60
        refused = client.post("/v1/completions", json={**body, "prompt": "a" * 90})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 120


def test_parallel_sequences_of_a_key_are_bounded(keyed: Keyed) -> None:
    made = give_key(keyed.state, Role.CLIENT, max_parallel=2)
    body = {"model": "base", "prompt": "abcd", "max_tokens": 2}
    with client_of(keyed.live, made.key) as client:
        keyed.live.until(lambda: client.get("/v1/models").status_code == 200)
        assert client.post("/v1/completions", json={**body, "n": 2}).status_code == 200
        assert client.post("/v1/completions", json={**body, "n": 3}).status_code == 400


def test_only_operators_go_before_others(keyed: Keyed) -> None:
    body = {"model": "base", "prompt": "abcd", "max_tokens": 1}
    for role, priority, status in [
        (Role.CLIENT, -1, 403), (Role.CLIENT, 0, 200), (Role.CLIENT, 7, 200), (Role.ADMIN, -1, 200),
    ]:  # fmt: skip
        with keyed.client(role) as client:
            response = client.post("/v1/completions", json={**body, "priority": priority})
            assert response.status_code == status
            assert status == 200 or response.json()["error"]["param"] == "priority"


# --- E5: what one key has asked shows in nothing that another one sees ------------------------


def salts(keyed: Keyed, role: Role, **more: object) -> list[str]:
    """Returns the salts under which the engine looks a request's prompts up."""
    seen, tenants = list[str](), set[str]()
    submit = EngineClient.submit

    def noting(client: EngineClient, *rest: Any, cache_salt: str, tenant: str, **more: Any) -> Any:
        seen.append(cache_salt)
        tenants.add(tenant)
        return submit(client, *rest, cache_salt=cache_salt, tenant=tenant, **more)

    with pytest.MonkeyPatch.context() as patch, keyed.client(role) as asking:
        patch.setattr(EngineClient, "submit", noting)
        body = {"model": "base", "prompt": "abcd", "max_tokens": 1, **more}
        assert asking.post("/v1/completions", json=body).status_code == 200
    key = keyed.keys[role]
    ids = {row.digest: row.id for row in keyed.live.services.registry.api_keys()}
    assert tenants == {ids[digest_of(key)] if key else ""}
    return seen


def test_prefixes_are_parted_by_key_and_then_by_salt_vllm_cve_2025_46570(keyed: Keyed) -> None:
    [plain], [again] = salts(keyed, Role.CLIENT), salts(keyed, Role.CLIENT)
    [salted], [other] = salts(keyed, Role.CLIENT, cache_salt="s"), salts(keyed, Role.ADMIN)
    assert plain == again
    assert len({plain, salted, other, "", "s"}) == 5
    [claimed] = salts(keyed, Role.ADMIN, cache_salt=plain)
    assert claimed != plain


def test_an_open_server_has_the_salts_that_clients_say(server: LiveServer) -> None:
    open_one = Keyed(server, dict.fromkeys(Role, ""), Path())
    assert salts(open_one, Role.CLIENT) == [""]
    assert salts(open_one, Role.CLIENT, cache_salt="s") == ["s"]
