"""What stands around the packages: pins, containers, shipped files."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from server.cli.main import COMMANDS
from server.cli.serve_options import add_arguments, settings_from

PROJECT = Path(__file__).resolve().parents[1]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_for_a_reproducible_install() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pinned = {normal(line.split("==")[0]) for line in lines if "==" in line}
    names = {normal(re.split(r"[\[<>=!~ ]", requirement)[0]) for requirement in wanted}
    assert names <= pinned
    assert "torch==2.13.0" in lines


def test_container_command_is_one_that_serve_takes(tmp_path: Path) -> None:
    command = re.findall(r"^CMD (\[.*\])$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE)
    name, *arguments = json.loads(command[-1])
    assert name in COMMANDS
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments[arguments.index("/models")] = str(tmp_path)  # a volume of the image
    settings = settings_from(parser.parse_args(arguments))
    assert settings.http.host == "0.0.0.0"  # published by compose on the loopback alone
    assert settings.models.root == tmp_path


def test_compose_mounts_what_exists_and_publishes_on_the_loopback() -> None:
    compose = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
    assert set(compose["services"]) == {"scrape-key", "linker", "prometheus", "grafana"}
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./configs"):
                assert (PROJECT / source).is_dir()
            elif not source.startswith("."):
                assert source in compose["volumes"]


@pytest.mark.parametrize(
    "name",
    ["default.yaml", "families.yaml", "prometheus/prometheus.yml", "prometheus/rules/alerts.yml"],
)
def test_configuration_ships_as_package_data(name: str) -> None:
    assert yaml.safe_load(files("configs").joinpath(name).read_text("utf-8"))


def test_readme_names_only_make_targets_and_files_that_exist() -> None:
    readme = (PROJECT / "README.md").read_text()
    targets = set(re.findall(r"^(\w[\w-]*):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`|=1 )make (\w[\w-]*)", readme, re.MULTILINE)) <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (PROJECT / link).is_file(), link
    for command in re.findall(r"^linker (\w+)", readme, re.MULTILINE):
        assert command in COMMANDS
