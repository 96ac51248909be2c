"""A fleet as a frame of text: what the server does, its memory, its models and its jobs.

Knows no HTTP. What is coloured is also said in words or by the shape of a character.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text

from server.cli.top import amounts
from server.cli.top.fleet import Fleet
from server.cli.top.memory import memory_lines
from server.cli.top.tables import job_lines, lines_wanted, model_table

_HEAD_LINES = 4  # beside the memory's: two, an empty one, and the table's own
_COMMAND = ("linker top", "bold")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One look at a fleet; as wide and as high as the console that shows it.

    Args:
        fleet: What is shown.
        url: Of its server.
        now_s: Seconds of the monotonic clock that the fleet's events were stamped with.
        fits: Whether what does not fit into the height is left out, and counted instead.
    """

    fleet: Fleet
    url: str
    now_s: float
    fits: bool

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        jobs = job_lines(self.fleet, width=options.max_width, is_ascii=options.ascii_only)
        memory: Sequence[Text] = memory_lines(
            self.fleet, width=options.max_width, is_ascii=options.ascii_only
        )
        most = None
        if self.fits:
            room = options.size.height - _HEAD_LINES - len(jobs) - 1
            memory = _fitting(memory, room - lines_wanted(self.fleet))
            most = max(1, room - len(memory))
        yield Group(
            _title(self.fleet, self.url, width=options.max_width, now_s=self.now_s),
            _work(self.fleet, self.now_s),
            *memory,
            Text(),
            model_table(
                self.fleet,
                width=options.max_width,
                now_s=self.now_s,
                wall_s=time.time(),
                most=most,
            ),
            *jobs,
        )


def _title(fleet: Fleet, url: str, *, width: int, now_s: float) -> Text:
    """Returns the server's name and state; the name gives way to the state."""
    line = Text()
    if fleet.trouble is not None:
        line.append(f"{fleet.trouble}; trying again", "bold red")
    elif fleet.lacks_status(now_s=now_s):
        line.append("this server says nothing of its state; it may be older than linker top", "red")
    elif (status := fleet.status) is not None:
        line.append("ready" if status.is_ready else "not ready", _mood(good=status.is_ready))
        line.append(f"  engine {status.engine}", _mood(good=status.engine == "running"))
        if status.reason is not None:
            line.append(f"  {status.reason}", "yellow")
    whole = Text.assemble(_COMMAND, f"  {url}  ", line)
    if whole.cell_len > width:
        whole = Text.assemble(_COMMAND, "  ", line)
    whole.no_wrap = True
    whole.truncate(width, overflow="ellipsis")
    return whole


def _fitting(memory: Sequence[Text], room: int) -> Sequence[Text]:
    """Returns what there is room for: all, what is saved, or nothing. Models with work go first."""
    choices = (memory, memory[-1:], ())
    return next(choice for choice in choices if len(choice) <= max(0, room))


def _mood(*, good: bool) -> str:
    return "green" if good else "bold yellow"


def _work(fleet: Fleet, now_s: float) -> Text:
    """Returns what the engine has to do and how fast it does it."""
    written = amounts.of_rate(fleet.rate("generation_tokens", now_s=now_s))
    read = amounts.of_rate(fleet.rate("prompt_tokens", now_s=now_s))
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{written} tok/s", "bold")
    line.append(f"  prompts {read} tok/s")
    if fleet.status is not None:
        status, totals = fleet.status, fleet.status.totals
        line.append(f"  running {status.running}  waiting {status.waiting}")
        line.append(f"  KV {amounts.of_ratio(status.kv_usage_ratio)}")
        looked_up = totals["prefix_queries"]
        hits = totals["prefix_hits"] / looked_up if looked_up else None
        line.append(f"  prefix hits {amounts.of_ratio(hits)}")
        if totals["preemptions"]:
            line.append(f"  preempted {totals['preemptions']}", "yellow")
    return line
