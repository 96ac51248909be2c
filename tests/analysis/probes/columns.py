"""Results of probes by the names of their columns."""

from __future__ import annotations

from analysis.probes.result import ProbeResult, Value


def records(result: ProbeResult) -> list[dict[str, Value]]:
    """Rows as records."""
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]


def numbers(result: ProbeResult, column: str) -> list[float]:
    """One column, every value of it a number."""
    values = [record[column] for record in records(result)]
    assert all(isinstance(value, (int, float)) for value in values)
    return [float(value) for value in values if isinstance(value, (int, float))]


def fact(result: ProbeResult, name: str) -> float:
    """One fact that is a number."""
    value = result.facts[name]
    assert isinstance(value, (int, float))
    return float(value)
