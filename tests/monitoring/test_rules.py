"""The rules say what they are meant to: Prometheus' own checks, and unit tests of every rule."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.monitoring.promtool import (
    CONFIG,
    PROJECT,
    RULES,
    UNIT_TESTS,
    Rule,
    promtool,
    rules,
    unit_tests,
)
from tests.monitoring.selectors import names_in

ALERTS = [rule for rule in rules() if rule.alert]
RECORDS = [rule for rule in rules() if rule.record]


def named(rule: Rule) -> str:
    return rule.alert or rule.record or ""


def test_configuration_is_one_that_prometheus_takes_with_all_rules(tmp_path: Path) -> None:
    shutil.copytree(CONFIG.parent, tmp_path / "prometheus")
    (tmp_path / "key").touch()
    config = tmp_path / "prometheus" / CONFIG.name
    config.write_text(CONFIG.read_text().replace("/keys/scrape", str(tmp_path / "key")))
    written = promtool("check", "config", config)
    assert f"SUCCESS: {len(RULES)} rule files found" in written
    assert len(RULES) >= 3


def test_rules_are_without_duplicates_and_errors() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)


@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: str(file.stem))
def test_rules_do_what_their_unit_tests_expect(file: Path) -> None:
    promtool("test", "rules", file)


@pytest.mark.parametrize("rule", ALERTS, ids=named)
def test_alert_is_tested_to_fire_and_to_keep_quiet(rule: Rule) -> None:
    expected = [
        len(case["exp_alerts"])
        for group in unit_tests()
        for case in group.get("alert_rule_test", [])
        if case["alertname"] == rule.alert
    ]
    assert max(expected) > 0
    assert min(expected) == 0


@pytest.mark.parametrize("rule", RECORDS, ids=named)
def test_recorded_series_is_tested_to_have_its_value(rule: Rule) -> None:
    tested = [
        case
        for group in unit_tests()
        for case in group.get("promql_expr_test", [])
        if rule.record in names_in(case["expr"]) and case["exp_samples"]
    ]
    assert tested


@pytest.mark.parametrize("rule", ALERTS, ids=named)
def test_alert_says_how_bad_it_is_what_it_is_and_what_to_do(rule: Rule) -> None:
    assert rule.labels["severity"] in {"critical", "warning"}
    assert set(rule.annotations) == {"summary", "description", "runbook"}
    file, _, anchor = rule.annotations["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (PROJECT / file).read_text(), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_containers_mount_the_rules() -> None:
    compose = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
    mounts = compose["services"]["prometheus"]["volumes"]
    assert "./configs/prometheus:/etc/prometheus:ro" in mounts
    patterns = yaml.safe_load(CONFIG.read_text())["rule_files"]
    assert sorted(file for at in patterns for file in CONFIG.parent.glob(at)) == RULES
