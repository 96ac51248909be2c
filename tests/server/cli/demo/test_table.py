from __future__ import annotations

import json
from typing import Any

from rich.console import Console, RenderableType

from server.cli.demo.table import Row, answers, render, verdict

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


def printed(what: RenderableType, *, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return capture.get().splitlines()


def shown() -> list[str]:
    return printed(render(ROWS), width=160)


def cells(lines: list[str], model: str) -> list[str]:
    [line] = [line for line in lines if f" {model} " in line]
    return [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]


def test_row_of_a_variant_shows_similarity_bytes_price_and_rungs() -> None:
    assert cells(shown(), "chat") == [
        "chat", "0.99991", "0.0123", "3.00", "0.50", "2.67", "0.0085",
        "int2 50%, lowrank 38%,",
    ]  # fmt: skip


def test_row_of_the_donor_is_like_itself() -> None:
    assert cells(shown(), "base") == [
        "base", "1.00000", "0.0000", "3.00", "3.00", "16.00", "", "own 100%",
    ]  # fmt: skip


def test_question_and_answer_are_shown_as_they_are_and_are_no_markup() -> None:
    rows = [*ROWS, Row.from_answers("code", VARIANT, " str):\n    raise")]
    lines = printed(answers(rows), width=160)
    assert [line.rstrip() for line in lines] == [
        "  base: 'Return a'",
        "    is [bold] used",
        "  chat: 'Hi! Tell me about textwrap.dedent.'",
        "    Sure thing!",
        "  code: '    if not isinstance('",  # its blanks are of the question
        "    str): raise",
    ]


def test_answer_is_wrapped_at_words() -> None:
    answer = "Remove any common leading whitespace from every line in text."
    lines = printed(answers([Row.from_answers("chat", VARIANT, answer)]), width=30)
    assert [word for line in lines[2:] for word in line.split()] == answer.split()
    assert all(len(line) <= 30 for line in lines)


def test_table_fits_a_terminal_of_eighty_columns() -> None:
    lines = printed(render(ROWS), width=80)
    for whole in ("0.99991", "0.0123", "0.0085", "lowrank", "38%"):
        assert any(whole in line for line in lines)


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
    assert cells(shown(), "total")[3:5] == ["6.00", "3.50"]
    assert verdict(ROWS) == ("separate copies would hold 6.0 MiB; 3.5 MiB are resident (42% saved)")


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
