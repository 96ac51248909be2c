"""Transformations: what Grafana makes of tables before it draws them.

A query in table form comes as a column for every label and one for the value: `Value`, or
`Value #A` where a panel has several queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from grafana_foundation_sdk.models.dashboard import DataTransformerConfig


def numeric(column: str) -> list[DataTransformerConfig]:
    """Makes numbers of a label's values, in ascending order."""
    conversion = {"targetField": column, "destinationType": "number"}
    return [
        DataTransformerConfig(id_val="convertFieldType", options={"conversions": [conversion]}),
        ascending(column),
    ]


def ascending(column: str) -> DataTransformerConfig:
    """Sorts rows."""
    order = {"fields": {}, "sort": [{"field": column, "desc": False}]}
    return DataTransformerConfig(id_val="sortBy", options=order)


def corner(rows: str, columns: str) -> str:
    """Returns the name of a matrix's first column, whatever it is shown as."""
    return f"{rows}\\{columns}"


def matrix(rows: str, columns: str) -> list[DataTransformerConfig]:
    """Spreads a query's value over the values of two labels; `rows` are shown under their name."""
    cells = {
        "rowField": rows,
        "columnField": columns,
        "valueField": "Value",
        "emptyValue": "null",
    }
    return [
        DataTransformerConfig(id_val="groupingToMatrix", options=cells),
        renamed({corner(rows, columns): rows}),
        ascending(rows),
    ]


def joined(column: str, names: Sequence[str]) -> list[DataTransformerConfig]:
    """Puts the values of several queries side by side, called `names`, by the label they share."""
    columns = {column: column}
    columns |= {f"Value #{ref}": name for ref, name in zip(ascii_uppercase, names, strict=False)}
    return [
        DataTransformerConfig(id_val="joinByField", options={"byField": column, "mode": "outer"}),
        DataTransformerConfig(
            id_val="filterFieldsByName", options={"exclude": {"pattern": "/^Time/"}}
        ),
        renamed(columns),
        ascending(column),
    ]


def in_time() -> list[DataTransformerConfig]:
    """Puts series side by side that were asked for over the same time."""
    return [
        DataTransformerConfig(id_val="joinByField", options={"byField": "Time", "mode": "outer"})
    ]


def renamed(names: Mapping[str, str]) -> DataTransformerConfig:
    """Renames columns, which come first then, in this order."""
    options = {
        "excludeByName": {},
        "includeByName": {},
        "indexByName": {name: place for place, name in enumerate(names)},
        "renameByName": dict(names),
    }
    return DataTransformerConfig(id_val="organize", options=options)
