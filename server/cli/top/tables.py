"""A fleet's models as a table and its jobs as bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from server.cli.top import amounts
from server.cli.top.fleet import Fleet
from server.cli.top.records import Job, Model

_STATE_STYLES = {
    "ready": "green",
    "onboarding": "cyan",
    "unloaded": "bright_black",
    "failed": "bold red",
}
_NAME_CHARS = (12, 40)  # of a model's name, at least and at most
_GAP = 2  # between columns
_BAR_CHARS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What the cells of one row are made from."""

    model: Model
    fleet: Fleet
    now_s: float  # of the clock of the fleet's events
    wall_s: float  # since the epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """One column beside the names; `rank` says how early it goes where it is narrow."""

    head: str
    chars: int
    rank: int
    cell: Callable[[_Row], Text | str]
    justify: Literal["left", "right"] = "right"


def model_table(
    fleet: Fleet, *, width: int, now_s: float, wall_s: float, most: int | None
) -> Table:
    """Returns the models, families together and donors first.

    Args:
        fleet: Whose models they are.
        width: In characters; columns that do not fit are left out.
        now_s: Of the clock of the fleet's events.
        wall_s: Seconds since the epoch.
        most: How many lines there are; what is left out is counted. None: all of them.
    """
    models = _ordered(fleet, most)
    longest = max((len(model.name) + 2 for model in models), default=0)
    name_chars = min(max(longest, _NAME_CHARS[0]), _NAME_CHARS[1])
    columns = _fitting(width - name_chars)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("MODEL", max_width=name_chars, no_wrap=True, overflow="ellipsis")
    for column in columns:
        table.add_column(column.head, justify=column.justify, width=column.chars, no_wrap=True)
    for model in models:
        row = _Row(model=model, fleet=fleet, now_s=now_s, wall_s=wall_s)
        table.add_row(_name(model), *(column.cell(row) for column in columns))
    if len(models) < len(fleet.models):
        table.add_row(Text(f"and {len(fleet.models) - len(models)} more", "italic"))
    return table


def lines_wanted(fleet: Fleet) -> int:
    """Returns how many lines of the table show every model with work, one at least."""
    num_busy = max(1, sum(_is_busy(model, fleet) for model in fleet.models.values()))
    return min(len(fleet.models), num_busy + 1)  # the last one says how many more


def job_lines(fleet: Fleet, *, width: int, is_ascii: bool) -> list[Text]:
    """Returns a line for every job that the fleet knows, after an empty one."""
    lines = [_job_line(job, width=width, is_ascii=is_ascii) for job in fleet.jobs.values()]
    return [Text(), *lines] if lines else []


def _ordered(fleet: Fleet, most: int | None) -> Sequence[Model]:
    """Returns the models that are shown: those with work where there is no room for all."""
    models = sorted(fleet.models.values(), key=lambda m: (m.family, m.donor is not None, m.name))
    if most is None or len(models) <= most:
        return models

    def idleness(model: Model) -> tuple[bool, bool, float]:
        return not _is_busy(model, fleet), not model.is_resident, -(model.last_used_at or 0.0)

    busiest = sorted(models, key=idleness)[: max(0, most - 1)]  # a line says how many more
    return [model for model in models if model in busiest]


def _is_busy(model: Model, fleet: Fleet) -> bool:
    load = None if fleet.status is None else fleet.status.models.get(model.name)
    return load is not None and load.running + load.waiting > 0


def _fitting(chars: int) -> list[_Column]:
    """Returns the columns that there is room for, in their order."""
    chosen: list[_Column] = []
    for column in sorted(_COLUMNS, key=lambda one: one.rank):
        if column.chars + _GAP > chars:
            break
        chars -= column.chars + _GAP
        chosen.append(column)
    return [column for column in _COLUMNS if column in chosen]


def _name(model: Model) -> Text:
    name = Text(model.name if model.donor is None else f"  {model.name}")
    name.stylize("bold" if model.donor is None else "")
    if model.is_pinned:
        name.append(" *", "yellow")
    return name


def _state(row: _Row) -> Text:
    return Text(row.model.state, _STATE_STYLES.get(row.model.state, ""))


def _running(row: _Row) -> str:
    loads = {} if row.fleet.status is None else row.fleet.status.models
    load = loads.get(row.model.name)
    return amounts.NOTHING if load is None else f"{load.running}/{load.waiting}"


def _price(row: _Row) -> Text:
    model = row.model
    if model.kl_upper is None:
        return Text(amounts.NOTHING)
    price = Text(amounts.of_nats(model.kl_upper, beside=model.budget_kl))
    if model.budget_kl is not None:
        sign = ">" if model.is_over_budget else "<="
        price.append(f" {sign} {amounts.of_nats(model.budget_kl)}")
    price.stylize("bold red" if model.is_over_budget else "")
    return price


def _rungs(row: _Row) -> str:
    return "/".join(str(count) for count in row.model.rungs.values()) or amounts.NOTHING


def _used(row: _Row) -> str:
    loads = {} if row.fleet.status is None else row.fleet.status.models
    load = loads.get(row.model.name)
    if load is not None and load.running:
        return "now"
    if row.model.last_used_at is None:
        return amounts.NOTHING
    return amounts.of_seconds(row.wall_s - row.model.last_used_at)


def _unique(row: _Row) -> str:
    sizes = row.model.sizes
    return amounts.of_bytes(None if sizes is None else sizes.unique)


def _shared(row: _Row) -> str:
    sizes = row.model.sizes
    return amounts.of_bytes(None if sizes is None else sizes.shared)


def _saved(row: _Row) -> str:
    sizes = row.model.sizes
    if sizes is None or not sizes.logical:
        return amounts.NOTHING
    return amounts.of_ratio((sizes.logical - sizes.unique) / sizes.logical)


def _rate(row: _Row) -> str:
    return amounts.of_rate(row.fleet.model_rate(row.model.name, now_s=row.now_s))


_COLUMNS = (
    _Column(head="STATE", chars=10, rank=0, cell=_state, justify="left"),
    _Column(head="UNIQUE", chars=6, rank=1, cell=_unique),
    _Column(head="SHARED", chars=6, rank=6, cell=_shared),
    _Column(head="SAVED", chars=5, rank=2, cell=_saved),
    _Column(head="KL, BUDGET", chars=17, rank=4, cell=_price),
    _Column(head="A/R/O", chars=8, rank=7, cell=_rungs),
    _Column(head="RUN", chars=5, rank=5, cell=_running),
    _Column(head="TOK/S", chars=5, rank=3, cell=_rate),
    _Column(head="USED", chars=4, rank=8, cell=_used),
)


def _job_line(job: Job, *, width: int, is_ascii: bool) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{job.model}  ", "bold")
    if job.error is not None:
        line.append(f"failed while {job.stage}: {job.error}", "bold red")
    elif job.status == "queued":
        line.append("queued")
    else:
        line.append(f"{job.stage} ")
        line.append(_progress(job, is_ascii=is_ascii))
    line.truncate(width, overflow="ellipsis")
    return line


def _progress(job: Job, *, is_ascii: bool) -> Text:
    if job.total_bytes <= 0:
        return Text("…" if not is_ascii else "...")
    ratio = min(1.0, job.done_bytes / job.total_bytes)
    done = round(_BAR_CHARS * ratio)
    full, empty = ("#", ".") if is_ascii else ("█", "░")
    said = Text.assemble((full * done, "cyan"), (empty * (_BAR_CHARS - done), "bright_black"))
    said.append(f" {amounts.of_ratio(ratio)} of {amounts.of_bytes(job.total_bytes)}")
    if job.bytes_per_second is not None:
        said.append(f"  {amounts.of_bytes(job.bytes_per_second)}/s")
    if job.remaining_s is not None:
        said.append(f"  {amounts.of_seconds(job.remaining_s)} left")
    return said
