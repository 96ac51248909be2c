"""What the dashboards' expressions give, in figures worked out by hand; promtool evaluates them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from configs.grafana.generator import savings_queries
from configs.grafana.generator.queries import MODEL, in_words
from tests.monitoring.boards import PANELS, Json, Panel
from tests.monitoring.dashboards import Target, filled_in, targets
from tests.monitoring.promtool import RULES, promtool
from tests.monitoring.selectors import labels_in
from tests.monitoring.test_names import LABELS

ALL = {"job": ".+", "instance": ".+", "family": ".+", "model": "(a|b|c|d|z)"}
ONE = 'job="linker",instance="one"'


class Weights(NamedTuple):
    """What a resident model takes, or as a copy would."""

    family: str
    model: str
    logical: int
    unique: int


# The donor of `a` holds 1000 bytes and its two variants 100 and 300 where copies of them would take
# 1000 and 1100; `d` is not resident. `z` has no variant. A twin takes 50.
HELD = (
    Weights("a", "a", 1000, 1000),
    Weights("a", "b", 1000, 100),
    Weights("a", "c", 1100, 300),
    Weights("a", "d", 0, 0),
    Weights("z", "z", 500, 500),
)


def fleet() -> dict[str, float]:
    """Returns every series of these weights with its value."""
    series: dict[str, float] = {}
    for family, model, logical, unique in HELD:
        name = f'linker_model_weight_bytes{{{ONE},family="{family}",model="{model}",kind="%s"}}'
        series |= {name % "logical": logical, name % "unique": unique}
    families = {"a": 1450, "z": 500}
    return series | {
        f'linker_family_weight_bytes{{{ONE},family="{family}"}}': held
        for family, held in families.items()
    }


def expect(directory: Path, series: dict[str, float], *cases: tuple[str, dict[str, float]]) -> None:
    """Fails unless each expression gives these values by their series, with the rules evaluated."""
    file = directory / "test.yml"
    tests = [
        {
            "expr": filled_in(expr, ALL),
            "eval_time": "10m",
            "exp_samples": [{"labels": name, "value": value} for name, value in samples.items()],
        }
        for expr, samples in cases
    ]
    inputs = [{"series": name, "values": f"{value}x20"} for name, value in series.items()]
    group = {"interval": "1m", "input_series": inputs, "promql_expr_test": tests}
    content = {"rule_files": [str(rule) for rule in RULES], "tests": [group]}
    file.write_text(yaml.safe_dump(content))
    promtool("test", "rules", file)


def test_savings_are_what_copies_would_take_less_what_is_held(tmp_path: Path) -> None:
    expect(
        tmp_path,
        fleet(),
        (savings_queries.HELD, {"{}": 1950}),
        (savings_queries.COPIES, {"{}": 3600}),
        (savings_queries.SAVED, {"{}": 1650}),
        (savings_queries.SAVED_RATIO, {"{}": 1650 / 3600}),
        (savings_queries.RESIDENT, {"{}": 4}),
        (savings_queries.TWINS, {"{}": 50}),
    )


def test_share_that_is_saved_is_absent_where_nothing_is_resident(tmp_path: Path) -> None:
    nothing = dict.fromkeys(fleet(), 0.0)
    expect(tmp_path, nothing, (savings_queries.SAVED_RATIO, {}), (savings_queries.SAVED, {"{}": 0}))


def test_projection_goes_through_what_is_measured_and_on_in_a_line(tmp_path: Path) -> None:
    # A variant of `a` takes (1400 - 1000) / 2 = 200 on average, a copy (3100 - 1000) / 2 = 1050.
    shared = {n: 1000 + (n - 1) * 200 for n in savings_queries.NUMBERS}
    copies = {n: 1000 + (n - 1) * 1050 for n in savings_queries.NUMBERS}
    assert 1000 + 2 * 200 == 1000 + 100 + 300
    assert 1000 + 2 * 1050 == 1000 + 1000 + 1100
    expect(
        tmp_path,
        fleet(),
        (savings_queries.PROJECTED, {f'{{N="{n}"}}': held for n, held in shared.items()}),
        (savings_queries.PROJECTED_COPIES, {f'{{N="{n}"}}': held for n, held in copies.items()}),
        (
            savings_queries.PROJECTED_RATIO,
            {f'{{N="{n}"}}': 1 - shared[n] / copies[n] for n in savings_queries.NUMBERS},
        ),
    )


def test_projection_is_absent_without_a_variant_to_learn_from(tmp_path: Path) -> None:
    alone = {name: value for name, value in fleet().items() if 'family="z"' in name}
    expect(tmp_path, alone, (savings_queries.PROJECTED, {}), (savings_queries.PROJECTED_RATIO, {}))


def test_states_are_numbered_in_the_order_of_their_words(tmp_path: Path) -> None:
    states = {
        f'linker_model_state{{{ONE},model="{model}",state="{state}"}}': float(state == now)
        for model, now in (("a", "ready"), ("b", "failed"))
        for state in ("ready", "unloaded", "failed")
    }
    words = ("ready", "unloaded", "failed")
    expr = in_words("linker_model_state", MODEL, "state", words, by="model")
    expect(tmp_path, states, (expr, {'{model="a"}': 0, '{model="b"}': 2}))


def test_no_alerts_are_none_and_firing_ones_are_counted(tmp_path: Path) -> None:
    [count] = {
        panel.json["targets"][0]["expr"] for panel in PANELS if panel.json["title"] == "Alerts"
    }
    down = {'up{job="linker",instance="one"}': 0.0, 'up{job="linker",instance="two"}': 0.0}
    expect(tmp_path, {'up{job="linker",instance="one"}': 1.0}, (count, {"{}": 0}))
    expect(tmp_path, down, (count, {"{}": 2}))


@pytest.mark.parametrize("panel", PANELS, ids=str)
def test_number_that_stands_for_a_word_is_shown_as_that_word(panel: Panel) -> None:
    shown = {
        place: result["text"]
        for mapping in _mappings(panel)
        if mapping["type"] == "value"
        for place, result in mapping["options"].items()
    }
    for target in panel.json["targets"]:
        for place, word in re.findall(r'(\d+) \* \(\w+\{[^}]*="(\w+)"\} == 1\)', target["expr"]):
            assert shown[place] == word


def _mappings(panel: Panel) -> list[Json]:
    config = panel.json["fieldConfig"]
    overridden = [
        mapping
        for override in config["overrides"]
        for setting in override["properties"]
        if setting["id"] == "mappings"
        for mapping in setting["value"]
    ]
    return [*config["defaults"].get("mappings", []), *overridden]


@pytest.mark.parametrize("target", sorted({*targets()}), ids=str)
def test_expression_obeys_what_is_chosen(target: Target) -> None:
    filtered: dict[str, set[str]] = {}
    for metric, label in labels_in(target.expr):
        filtered.setdefault(metric, set()).add(label)
    assert filtered or target.expr.startswith("vector(")
    for metric, labels in filtered.items():
        assert {"job", "instance"} <= labels
        narrowed = LABELS.get(metric, set()) & {"model", "family"}
        assert not narrowed or narrowed & labels


def test_expressions_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": "checked", "labels": {"number": str(number)}, "expr": filled_in(expr, ALL)}
        for number, expr in enumerate(sorted({target.expr for target in targets()}))
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    promtool("check", "rules", file)
