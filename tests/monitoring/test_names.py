"""Rules and dashboards ask for what the server exposes or Prometheus records, and nothing else."""

from __future__ import annotations

import pytest

from server.metrics.families import FAMILIES
from tests.monitoring.dashboards import targets
from tests.monitoring.promtool import rules
from tests.monitoring.selectors import labels_in, names_in

EXPRESSIONS = sorted({rule.expr for rule in rules()} | {target.expr for target in targets()})
# By sample name, the labels that series have; Prometheus adds the first two.
LABELS = {
    sample: {"job", "instance", *family.labels, *(["le"] if sample.endswith("_bucket") else [])}
    for family in FAMILIES.values()
    for sample in family.samples
}
RECORDED = {rule.record for rule in rules() if rule.record}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_asks_for_what_there_is(expression: str) -> None:
    assert names_in(expression) <= LABELS.keys() | RECORDED


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_metric_is_filtered_by_labels_that_it_has(expression: str) -> None:
    for metric, label in labels_in(expression):
        assert metric not in LABELS or label in LABELS[metric], (metric, label)


def test_recorded_series_say_what_they_are_of_first() -> None:
    assert {record.split(":")[0] for record in RECORDED} == {"model", "family", "instance"}
