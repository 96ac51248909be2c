"""The server over a registry in PostgreSQL instead of SQLite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import URL

from linker_core.errors import InvalidRequestError
from server.registry.database import _SETTINGS
from server.registry.store import Registry
from tests.server.live import LiveServer, live_server
from tests.server.postgres import Cluster
from tests.tiny import make_variant


@pytest.fixture
def url(cluster: Cluster) -> URL:
    return cluster.new_database()


def over(url: URL, root: Path, **more: Any) -> Any:
    """A server over a registry; `root` holds its models and its state directory."""
    return live_server(
        root / "state",
        root=root,
        settings={"storage": {"registry_url": url.render_as_string(hide_password=False)}},
        **more,
    )


def states(server: LiveServer) -> dict[str, str]:
    return {model["id"]: model["state"] for model in server.client.get("/models").json()["data"]}


def card(server: LiveServer, name: str) -> dict[str, Any]:
    shown: dict[str, Any] = server.client.get(f"/models/{name}").json()
    return {key: value for key, value in shown.items() if key != "last_used_at"}


def test_models_live_through_restarts_and_deletions(
    url: URL, tmp_path: Path, models: dict[str, Path]
) -> None:
    with over(url, tmp_path) as server:
        for name, source in models.items():
            response = server.onboard(name, source)
            assert response.status_code == 201, response.text
        before = card(server, "near")
        assert server.client.delete("/models/base").status_code == 409
    assert not (tmp_path / "state" / "registry.sqlite3").exists()
    with over(url, tmp_path) as server:
        server.until(lambda: states(server) == {"base": "ready", "near": "ready"})
        assert server.chat("near").status_code == 200
        assert card(server, "near") == before
        assert server.client.delete("/models/near").status_code == 200
    with over(url, tmp_path) as server:
        server.until(lambda: states(server) == {"base": "ready"})
        assert server.onboard("near", models["near"]).status_code == 201


def test_rehomed_family_comes_back(
    cluster: Cluster, url: URL, tmp_path: Path, models: dict[str, Path]
) -> None:
    with over(url, tmp_path) as server:
        for name, source in models.items():
            assert server.onboard(name, source).status_code == 201
        deleted = server.client.delete("/models/base", params={"rehome": True})
        assert deleted.status_code == 200, deleted.text
        assert cluster.rows(url, "SELECT source FROM bases") == [(str(models["base"]),)]
    with over(url, tmp_path) as server:
        server.until(lambda: states(server) == {"near": "ready"})
        assert server.chat("near").status_code == 200
        assert server.client.delete("/models/near").status_code == 200
        server.until(lambda: cluster.rows(url, "SELECT source FROM bases") == [])


def test_server_answers_while_the_database_is_away(
    cluster: Cluster, url: URL, tmp_path: Path, models: dict[str, Path]
) -> None:
    make_variant(tmp_path / "late", models["base"], scale=0.01, seed=5)
    with over(url, tmp_path, models=models) as server:
        server.until_ready()
        with cluster.crashed():
            assert server.chat("near").status_code == 200
            refused = server.onboard("late", tmp_path / "late")
            assert refused.status_code == 503
            assert "registry" in refused.json()["error"]["message"]
            assert "Retry-After" in refused.headers
        assert server.onboard("late", tmp_path / "late").status_code == 201
        assert server.chat("late").status_code == 200


def test_registry_of_a_running_server_is_not_opened_by_another(
    url: URL, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = (*_SETTINGS["postgresql"], "SET lock_timeout = 10")
    monkeypatch.setitem(_SETTINGS, "postgresql", impatient)
    with over(url, tmp_path, models=models) as server:
        server.until_ready()
        with pytest.raises(InvalidRequestError, match="another server uses it"):
            Registry.open(url)
        assert server.chat("near").status_code == 200
    Registry.open(url).close()
