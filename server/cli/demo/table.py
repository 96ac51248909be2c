"""What the tour found, as rows for tools, and for people as a table and what was said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from server.cli.demo.tour import QUESTIONS
from server.cli.sizes import mib, mib_cell

_MIX_WIDTH = 24
_NUM_RUNGS_SHOWN = 3  # of a mix, the largest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model: what it shares, what it holds, what it said."""

    model: str
    blocks: Mapping[str, int]  # alias, residual, own, total
    rung_bytes: Mapping[str, int]  # unique bytes by kind of rung
    bits_per_weight: float  # unique bytes, all in
    mean_cos: float
    mean_epsilon: float
    bytes: Mapping[str, int]  # logical, unique, shared, checkpoint
    kl: float | None  # nats per token that sharing costs; None: not measured
    answer: str

    @classmethod
    def from_answers(cls, model: str, record: Mapping[str, Any], answer: str) -> Self:
        """Builds the row from what `GET /models/{name}` and the model itself answered."""
        plan = record["plan"]
        return cls(
            model=model,
            blocks=dict(record["blocks"]),
            rung_bytes=dict(plan["rung_bytes"]),
            bits_per_weight=plan["bits_per_weight"],
            mean_cos=plan["mean_cos"],
            mean_epsilon=plan["mean_epsilon"],
            bytes=dict(record["bytes"]),
            kl=None if plan["price"] is None else plan["price"]["kl"],
            answer=answer,
        )

    def to_record(self) -> dict[str, Any]:
        """Returns the row as JSON takes it."""
        return asdict(self)


def render(rows: Sequence[Row]) -> Table:
    """Returns the table, with the totals in its last line."""
    table = Table(show_footer=True, title="One resident base, three fine-tunes")
    logical = sum(row.bytes["logical"] for row in rows)
    unique = sum(row.bytes["unique"] for row in rows)
    numbers: dict[str, str] = {
        "mean cos": "",
        "mean ε": "",
        "copy MiB": mib_cell(logical),
        "held MiB": mib_cell(unique),
        "bits/weight": "",
        "KL (nats)": "",
    }
    table.add_column("model", footer="total", no_wrap=True)
    for title, footer in numbers.items():
        table.add_column(title, footer=footer, justify="right")
    table.add_column("rungs, % of held", max_width=_MIX_WIDTH)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def verdict(rows: Sequence[Row]) -> str:
    """Returns what separate copies would hold, and what is held, in a sentence."""
    logical = sum(row.bytes["logical"] for row in rows)
    unique = sum(row.bytes["unique"] for row in rows)
    saved = (logical - unique) / logical if logical else 0.0
    return (
        f"separate copies would hold {mib(logical)}; {mib(unique)} are resident ({saved:.0%} saved)"
    )


def answers(rows: Sequence[Row]) -> Group:
    """Returns each model's question and answer, wrapped at words."""
    said: list[RenderableType] = []
    for row in rows:
        # As Text: either may hold what looks like markup.
        asked = Text(f"{row.model}: {QUESTIONS[row.model].text!r}")
        answer = Text(" ".join(row.answer.split()))
        said += [
            Padding(asked, (0, 0, 0, 2), expand=False),
            Padding(answer, (0, 0, 0, 4), expand=False),
        ]
    return Group(*said)


def _cells(row: Row) -> list[str]:
    return [
        row.model,
        f"{row.mean_cos:.5f}",
        f"{row.mean_epsilon:.4f}",
        mib_cell(row.bytes["logical"]),
        mib_cell(row.bytes["unique"]),
        f"{row.bits_per_weight:.2f}",
        "" if row.kl is None else f"{row.kl:.4f}",
        _mix(row.rung_bytes),
    ]


def _mix(rung_bytes: Mapping[str, int]) -> str:
    """Returns what a model's own bytes are made of: "int2 61 %, lowrank 30 %, own 9 %"."""
    total = sum(rung_bytes.values())
    held = sorted(((n, kind) for kind, n in rung_bytes.items() if n), reverse=True)
    shown = [f"{kind} {n / total:.0%}" for n, kind in held[:_NUM_RUNGS_SHOWN]]
    return ", ".join([*shown, "…"] if len(held) > _NUM_RUNGS_SHOWN else shown) or "alias"
