"""Prometheus' text format (0.0.4), made so that a scrape writes numbers and nothing else.

Fifty models under traffic are some twenty thousand series. What names a series is written once,
when the series comes, with a place for its value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from server.metrics.families import Family

_IN_HELP = str.maketrans({"\\": r"\\", "\n": r"\n"})
_IN_VALUES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def header(family: Family) -> str:
    """Returns the lines before a family's samples."""
    told = family.help.translate(_IN_HELP)
    return f"# HELP {family.name} {told}\n# TYPE {family.name} {family.kind.value}\n"


def series(name: str, labels: Mapping[str, str]) -> str:
    """Returns what names one series, its labels in alphabetical order."""
    if not labels:
        return name
    pairs = (f'{label}="{value.translate(_IN_VALUES)}"' for label, value in sorted(labels.items()))
    return f"{name}{{{','.join(pairs)}}}"


def template(names: Iterable[str]) -> str:
    """Returns lines that `%` a tuple of numbers completes, one for each series."""
    escaped = (name.replace("%", "%%") for name in names)
    return "".join(f"{name} %s\n" for name in escaped)
