from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from server.cli.demo.table import Row, render

MIB = 1 << 20
# What GET /models/{name} gave for a donor and a variant.
DONOR: dict[str, Any] = {
    "id": "base",
    "object": "model",
    "state": "ready",
    "donor": None,
    "bytes": {"logical": 3 * MIB, "unique": 3 * MIB, "shared": 0, "saved": 0,
              "checkpoint": 3 * MIB},
    "blocks": {"alias": 0, "residual": 0, "own": 6, "total": 6},
    "plan": {"policy": "thresholds", "tau_cos": None, "tau_frob": None, "mean_cos": 1.0,
             "mean_epsilon": 0.0, "region": "aligned", "price": None},
}  # fmt: skip
VARIANT: dict[str, Any] = {
    **DONOR,
    "id": "chat",
    "donor": "base",
    "bytes": {"logical": 3 * MIB, "unique": MIB // 2, "shared": 5 * MIB // 2,
              "saved": 5 * MIB // 2, "checkpoint": 3 * MIB},
    "blocks": {"alias": 6, "residual": 0, "own": 0, "total": 6},
    "plan": {"policy": "thresholds", "tau_cos": 0.999, "tau_frob": 0.05, "mean_cos": 0.99991,
             "mean_epsilon": 0.0123, "region": "aligned", "price": {"kl": 1.04849}},
}  # fmt: skip
ROWS = [
    Row.from_answers("base", DONOR, " is [bold]\nused"),
    Row.from_answers("chat", VARIANT, "Sure thing!"),
]


def shown() -> list[str]:
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(render(ROWS))
    return capture.get().splitlines()


def cells(lines: list[str], model: str) -> list[str]:
    [line] = [line for line in lines if f" {model} " in line]
    return [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]


def test_row_of_a_variant_shows_blocks_similarity_bytes_and_answer() -> None:
    assert cells(shown(), "chat") == [
        "chat", "6/6", "0.99991", "0.0123", "3.00", "0.50", "2.50", "1.048", "Sure thing!",
    ]  # fmt: skip


def test_row_of_the_donor_is_like_itself_and_answers_are_no_markup() -> None:
    assert cells(shown(), "base") == [
        "base", "0/6", "1.00000", "0.0000", "3.00", "3.00", "0.00", "", "is [bold] used",
    ]  # fmt: skip


def test_total_sets_separate_copies_against_what_is_resident() -> None:
    total = cells(shown(), "total")
    assert total[4:7] == ["6.00", "3.50", "2.50"]
    assert "6.00 MiB" in total[8]
    assert "42% saved" in " ".join(shown())


def test_records_have_the_promised_keys_and_are_json() -> None:
    records = json.loads(json.dumps([row.to_record() for row in ROWS]))
    assert [set(record) for record in records] == [
        {"model", "blocks", "mean_cos", "mean_epsilon", "bytes", "kl", "answer"}
    ] * 2
    assert records[1]["blocks"] == {"alias": 6, "residual": 0, "own": 0, "total": 6}
    assert records[1]["bytes"]["unique"] == MIB // 2
    assert records[1]["answer"] == "Sure thing!"
