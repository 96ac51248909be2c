"""The container files agree with the command and with each other."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import yaml

from server.cli import keys, main
from server.gateway.schemas.operators import OnboardBody
from server.gateway.schemas.parsing import parse_request
from server.registry.records import Role
from server.registry.store import Registry
from tests.server.keyed import registry_url

ROOT = Path(__file__).parents[2]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def dockerfile(instruction: str) -> list[str]:
    """Returns the arguments of an instruction that comes once."""
    [line] = [
        line
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"{instruction} [")
    ]
    arguments: list[str] = json.loads(line.removeprefix(instruction))
    return arguments


def test_image_serves_beyond_the_loopback_with_keys_alone() -> None:
    command = dockerfile("CMD")
    assert command[:3] == ["serve", "--host", "0.0.0.0"]
    assert "--no-auth" not in command
    assert "command" not in read("docker-compose.yml")["services"]["linker"]


def test_image_has_what_settings_alone_ask_for() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    [extras] = re.findall(r"\.whl\)\[(.*)\]", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) == {"postgres", "otel"} <= project["optional-dependencies"].keys()


def test_image_is_built_once_and_never_pulled() -> None:
    services = read("docker-compose.yml")["services"]
    built = [name for name, service in services.items() if "build" in service]
    assert built == ["linker"]
    ours = {service["image"] for service in (services["linker"], services["scrape-key"])}
    assert len(ours) == 1
    assert services["scrape-key"]["pull_policy"] == "never"


def test_models_beside_the_compose_file_are_in_no_image_and_no_commit() -> None:
    assert "./models:/models:ro" in read("docker-compose.yml")["services"]["linker"]["volumes"]
    assert "models" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "/models/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_head_of_the_compose_file_onboards_as_the_server_takes_it() -> None:
    head = (ROOT / "docker-compose.yml").read_text(encoding="utf-8").partition("services:")[0]
    bodies = [
        parse_request(OnboardBody, json.loads(body)) for body in re.findall(r"post '(.+)'", head)
    ]
    assert [(body.name, body.source, body.donor) for body in bodies] == [
        ("base", "/models/base", None),
        ("chat", "/models/chat", "base"),
    ]
    [arguments] = re.findall(r"linker keys (create .*)\)", head)
    parser = argparse.ArgumentParser()
    keys.add_arguments(parser)
    parsed = parser.parse_args(shlex.split(arguments))
    assert (parsed.role, str(parsed.state)) == ("admin", dockerfile("CMD")[-1])
    [user] = re.findall(r"the server's user, (\d+)", head)
    assert f"useradd --uid {user} " in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_scrape_key_is_made_before_the_server_starts_and_kept(tmp_path: Path) -> None:
    services = read("docker-compose.yml")["services"]
    after = services["linker"]["depends_on"]["scrape-key"]["condition"]
    assert after == "service_completed_successfully"
    [script] = services["scrape-key"]["command"]
    linker, *arguments = shlex.split(script.partition(" && ")[0])
    assert linker == "linker"
    inside = [argument.replace("/keys", str(tmp_path)) for argument in arguments]
    inside = [argument.replace("/state", str(tmp_path / "state")) for argument in inside]
    for _ in range(2):
        assert main.main(inside) == 0
    registry = Registry.open_beside(registry_url(tmp_path / "state"))
    [key] = registry.api_keys()
    registry.close()
    assert (key.role, key.revoked_at) == (Role.METRICS, None)
    assert (tmp_path / "scrape").read_text().startswith(key.prefix)


def test_prometheus_shows_the_key_that_is_made_for_it() -> None:
    compose = read("docker-compose.yml")
    [job] = read("configs/prometheus/prometheus.yml")["scrape_configs"]
    file = job["authorization"]["credentials_file"]
    assert f"--file {file} " in compose["services"]["scrape-key"]["command"][0]
    assert "keys:/keys:ro" in compose["services"]["prometheus"]["volumes"]
    [group] = compose["services"]["prometheus"]["group_add"]
    assert f"groupadd --gid {group} linker" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
