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
    "plan": {"policy": "donor", "tau_cos": None, "tau_frob": None, "mean_cos": 1.0,
             "mean_epsilon": 0.0, "region": "aligned", "price": None,
             "rung_bytes": {"own": 3 * MIB}, "bits_per_weight": 16.0},
}  # fmt: skip
VARIANT: dict[str, Any] = {
    **DONOR,
    "id": "chat",
    "donor": "base",
    "bytes": {"logical": 3 * MIB, "unique": MIB // 2, "shared": 5 * MIB // 2,
              "saved": 5 * MIB // 2, "checkpoint": 3 * MIB},
    "blocks": {"alias": 2, "residual": 4, "own": 0, "total": 6},
    "plan": {"policy": "budget", "tau_cos": None, "tau_frob": None, "mean_cos": 0.99991,
             "mean_epsilon": 0.0123, "region": "aligned", "price": {"kl": 0.00849},
             "rung_bytes": {"alias": 0, "own": MIB // 16, "int2": MIB // 4,
                            "lowrank": 3 * MIB // 16},
             "bits_per_weight": 8 / 3},
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


def test_row_of_a_variant_shows_similarity_bytes_price_rungs_and_answer() -> None:
    assert cells(shown(), "chat") == [
        "chat", "0.99991", "0.0123", "3.00", "0.50", "2.67", "0.0085",
        "int2 50%, lowrank 38%,", "Sure thing!",
    ]  # fmt: skip


def test_row_of_the_donor_is_like_itself_and_answers_are_no_markup() -> None:
    assert cells(shown(), "base") == [
        "base", "1.00000", "0.0000", "3.00", "3.00", "16.00", "", "own 100%", "is [bold] used",
    ]  # fmt: skip


def test_mix_shows_the_largest_rungs_and_says_that_there_are_more() -> None:
    plan = {**VARIANT["plan"], "rung_bytes": {"int2": 50, "own": 10, "rows": 1, "int3": 39}}
    row = Row.from_answers("chat", {**VARIANT, "plan": plan}, "Sure")
    console = Console(width=240, color_system=None)
    with console.capture() as capture:
        console.print(render([row]))
    assert "int2 50%, int3 39%, own" in capture.get()
    assert "10%, …" in capture.get()


def test_variant_that_holds_nothing_is_all_alias() -> None:
    plan = {**VARIANT["plan"], "rung_bytes": {"alias": 0}, "bits_per_weight": 0.0}
    row = Row.from_answers("chat", {**VARIANT, "plan": plan}, "Sure")
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(render([row]))
    assert "alias" in capture.get()


def test_total_sets_separate_copies_against_what_is_resident() -> None:
    total = cells(shown(), "total")
    assert total[3:5] == ["6.00", "3.50"]
    assert "6.00 MiB" in total[8]
    assert "42% saved" in " ".join(shown())


def test_records_have_the_promised_keys_and_are_json() -> None:
    records = json.loads(json.dumps([row.to_record() for row in ROWS]))
    assert [set(record) for record in records] == [
        {"model", "blocks", "rung_bytes", "bits_per_weight", "mean_cos", "mean_epsilon", "bytes",
         "kl", "answer"}
    ] * 2  # fmt: skip
    assert records[1]["blocks"] == {"alias": 2, "residual": 4, "own": 0, "total": 6}
    assert records[1]["rung_bytes"]["int2"] == MIB // 4
    assert records[1]["bytes"]["unique"] == MIB // 2
    assert records[1]["answer"] == "Sure thing!"
