"""Prometheus' own checks, and what stands in the files that it reads."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.programs import program

PROJECT = Path(__file__).resolve().parents[2]
CONFIG = PROJECT / "configs/prometheus/prometheus.yml"
RULES = sorted((PROJECT / "configs/prometheus/rules").glob("*.yml"))
UNIT_TESTS = sorted((Path(__file__).parent / "rules").glob("*.yml"))


class Rule(NamedTuple):
    """An alert or a recorded series."""

    alert: str | None
    record: str | None
    expr: str
    labels: dict[str, str]
    annotations: dict[str, str]


def promtool(*arguments: str | Path) -> str:
    """Returns what a promtool command writes; fails if it does."""
    command = [program("promtool", what="Prometheus"), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    written = done.stdout + done.stderr
    assert done.returncode == 0, written
    return written


def rules() -> Iterator[Rule]:
    """Yields every rule."""
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                yield Rule(
                    rule.get("alert"),
                    rule.get("record"),
                    rule["expr"],
                    rule.get("labels", {}),
                    rule.get("annotations", {}),
                )


def unit_tests() -> Iterator[dict[str, Any]]:
    """Yields every group of unit tests."""
    for file in UNIT_TESTS:
        yield from yaml.safe_load(file.read_text())["tests"]
