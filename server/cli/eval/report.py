"""Scores as text: one run's, and what sharing retains (BS appendix D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# BS tables 6 and 7: the benchmarks, each by the metric that it is reported by.
RETENTION_TASKS: Mapping[str, str] = {
    "mmlu": "acc",
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
}
LEAST_RETAINED = 0.94  # BS appendix D: cells below are marked

Tasks = Mapping[str, Mapping[str, Any]]  # by task: its metrics and how they came about


class Cell(NamedTuple):
    """One benchmark of BS table 7, and of table 6."""

    task: str
    metric: str
    unshared: float  # shares, from 0 to 1
    shared: float

    @property
    def retained(self) -> float | None:
        """What is left of the unshared score; None where that is nothing."""
        return self.shared / self.unshared if self.unshared else None

    @property
    def is_low(self) -> bool:
        return self.retained is not None and self.retained < LEAST_RETAINED

    def to_json(self) -> dict[str, Any]:
        """Returns the cell as plain JSON values."""
        return {**self._asdict(), "retained": self.retained, "is_low": self.is_low}


def retention(unshared: Tasks, shared: Tasks, names: Sequence[str]) -> list[Cell]:
    """Returns a cell for every task that both have answered, by its first metric if it has no own.

    Args:
        unshared: With the model's own weights.
        shared: As its plan stores them.
        names: The tasks, in order.
    """
    both = {task: said for task, said in unshared.items() if task in shared}
    cells = []
    for task in _told(both, names):
        own, planned = both[task]["metrics"], shared[task]["metrics"]
        metrics = [metric for metric in own if metric in planned]
        metrics.sort(key=lambda metric: metric != RETENTION_TASKS.get(task))
        if metrics:
            cells.append(Cell(task, metrics[0], own[metrics[0]], planned[metrics[0]]))
    return cells


def retention_table(name: str, cells: Sequence[Cell], *, limit: int | None) -> str:
    """Returns BS tables 6 and 7 of one variant."""
    width = max((len(cell.task) for cell in cells), default=0)
    lines = [
        f"{name}: scores in %, and what sharing retains of them (BS appendix D)",
        f"  {'task':<{width}}  {'metric':<12} {'unshared':>8} {'shared':>8} {'retained':>9}",
    ]
    for cell in cells:
        mark = f"  * below {LEAST_RETAINED:.0%}" if cell.is_low else ""
        kept = "-" if cell.retained is None else f"{cell.retained:.1%}"
        lines.append(
            f"  {cell.task:<{width}}  {cell.metric:<12} {100 * cell.unshared:8.1f} "
            f"{100 * cell.shared:8.1f} {kept:>9}{mark}"
        )
    return "\n".join([*lines, *_caveat(limit)])


def score_table(name: str, tasks: Tasks, names: Sequence[str], *, limit: int | None) -> str:
    """Returns the scores of one run; a group's tasks are left to its own line."""
    rows = [
        (task, metric, value, tasks[task]["stderr"].get(metric))
        for task in _told(tasks, names)
        for metric, value in tasks[task]["metrics"].items()
    ]
    width = max(len(task) for task, *_ in rows)
    lines = [name]
    for task, metric, value, error in rows:
        range_ = "" if error is None else f" ± {error:.4f}"
        lines.append(f"  {task:<{width}}  {metric:<28} {value:.4f}{range_}")
    return "\n".join([*lines, *_caveat(limit)])


def _told(tasks: Tasks, names: Sequence[str]) -> list[str]:
    """Returns the tasks that were asked for; all, where one of the names stands for others."""
    return list(names if all(name in tasks for name in names) else tasks)


def _caveat(limit: int | None) -> list[str]:
    if limit is None:
        return []
    return [f"  The first {limit} samples of each task only: not a score to compare with others."]
