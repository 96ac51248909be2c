"""What a dashboard can be narrowed down to."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import (
    VariableModel,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from configs.grafana.generator.style import DATASOURCE

# By name: what to call it, the series that have it, what is asked before, and whether "All" may be
# any value. Models are listed instead, since most of their series do not say their family.
_LABELS = (
    ("job", "Job", "linker_engine_up", "", True),
    ("instance", "Instance", "linker_engine_up", 'job=~"$job"', True),
    (
        "family",
        "Family",
        "linker_family_weight_bytes",
        'job=~"$job",instance=~"$instance"',
        True,
    ),
    (
        "model",
        "Model",
        "linker_model_weight_bytes",
        'job=~"$job",instance=~"$instance",family=~"$family"',
        False,
    ),
)
_REF = "PrometheusVariableQueryEditor-VariableQuery"


def variables() -> list[Builder[VariableModel]]:
    """Returns all variables: the data source and four labels, each narrowed by those before."""
    provisioned = VariableOption(selected=True, text="Prometheus", value="prometheus")
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    return [source.current(provisioned).allow_custom_value(False), *map(_label, _LABELS)]


def _label(row: tuple[str, str, str, str, bool]) -> dashboard.QueryVariable:
    name, label, metric, scope, any_value = row
    series = f"{metric}{{{scope}}}" if scope else metric
    variable = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query({"qryType": 1, "query": f"label_values({series},{name})", "refId": _REF})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )
    return variable.all_value(".+") if any_value else variable
