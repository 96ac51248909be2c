"""What the charts calculate, against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from server.metrics.sharing import KINDS
from tests.browser.stage import Stage, card, staged

KIB = 1024


@pytest.fixture(scope="module")
def stage(browser: Browser) -> Iterator[Stage]:
    with staged(browser) as opened:
        yield opened


def test_totals_of_a_family_count_what_copies_would_hold(stage: Stage) -> None:
    models = [card("base", unique=1000), card("a", donor="base", unique=100)]
    found = stage.call("memory", "m.totals(models)", models=models)
    assert found == {"unique": 1100, "separate": 2000, "saved": 900, "ratio": 0.45}


def test_unshared_weights_save_nothing(stage: Stage) -> None:
    models = [card("base", unique=1000), card("a", donor="base", unique=100)]
    for weights, saved in ((1100, 900), (1101, 900), (2100, -100)):
        given = {"models": models, "device": {"weights": weights}}
        assert stage.call("memory", "m.totals(models, device).saved", **given) == saved


def test_totals_without_models_have_no_ratio(stage: Stage) -> None:
    assert stage.call("memory", "m.totals([]).ratio") is None


def test_residents_leave_out_who_is_not_on_the_device(stage: Stage) -> None:
    models = [
        card("z", donor="base", unique=1),
        card("gone", donor="base", unique=1) | {"state": "unloaded"},
        card("unplanned", donor="base", unique=1) | {"bytes": None},
        card("base", unique=9),
    ]
    found = stage.call("memory", "m.residents(models).map((one) => one.id)", models=models)
    assert found == ["base", "z"]


def test_growth_goes_on_with_the_mean_of_the_variants(stage: Stage) -> None:
    models = [
        card("base", unique=1000),
        card("a", donor="base", unique=100),
        card("b", donor="base", unique=300, logical=1200),
    ]
    found = stage.call("memory", "m.growth(models, 5)", models=models)
    assert [(point["count"], point["shared"], point["separate"]) for point in found] == [
        (1, 1000, 1000), (2, 1100, 2000), (3, 1400, 3200), (4, 1600, 4300), (5, 1800, 5400),
    ]  # fmt: skip
    assert [point["isThere"] for point in found] == [True, True, True, False, False]


def test_growth_of_a_donor_alone_foretells_nothing(stage: Stage) -> None:
    found = stage.call("memory", "m.growth(models, 5)", models=[card("base", unique=1000)])
    assert len(found) == 1


@pytest.mark.parametrize(
    ("unique", "sizes"),
    [
        (1000, [1000, 200, 50, 750]),
        (700, [700, 300, 200, 50, 750]),  # the rest are copies to compare with
        (0, [1000, 200, 50, 750]),  # no record has come yet
        (1100, [1000, 200, 50, 750]),  # a record came before the sum
    ],
)
def test_parts_of_the_device_make_up_its_budget(
    stage: Stage, unique: int, sizes: list[int]
) -> None:
    device = {"weights": 1000, "kv": 200, "other": 50, "free": 750, "budget": 2000}
    parts = stage.call("memory", "m.deviceParts(device, unique)", device=device, unique=unique)
    assert [part["size"] for part in parts] == sizes
    assert sum(part["size"] for part in parts) == 2000


def test_kinds_come_cheapest_first_and_never_empty(stage: Stage) -> None:
    model = card("a", donor="base", unique=1)
    model["plan"]["rung_bytes"] = {"own": 5, "alias": 0, "lowrank+signs": 1, "int4": 2, "rows": 3}
    found = stage.call("memory", "m.kindsOf([model])", model=model)
    assert found == ["rows", "int4", "lowrank+signs", "own"]
    names = stage.call("stacks", "kinds.map(m.kindName)", kinds=found)
    assert names == ["own rows", "4-bit residual", "low-rank + sign residual", "own tensors"]


def test_kinds_are_told_apart(stage: Stage) -> None:
    looks = "kinds.map((kind) => [p.kindToken(kind), m.kindPattern(kind)].join())"
    given = f"import('/ui/palette.js').then((p) => {looks})"
    found = stage.call("stacks", f"await {given}", kinds=KINDS)
    assert len(set(found)) == len(KINDS)


def test_efficient_plans_are_those_that_no_other_beats(stage: Stage) -> None:
    sizes_and_prices = [(30, 0.1), (10, 0.5), (20, 0.6), (30, 0.2), (40, 0.1), (50, 0.0)]
    plans = [{"unique_bytes": size, "kl": kl} for size, kl in sizes_and_prices]
    found = stage.call("prices", "m.efficient(plans)", plans=plans)
    assert [(plan["unique_bytes"], plan["kl"]) for plan in found] == [(10, 0.5), (30, 0.1), (50, 0)]


@pytest.mark.parametrize(
    ("prices", "floor"),
    [
        ([0.0, 0.0], 1e-7),
        ([0.0, 0.02], 1e-2),
        ([0.01], 1e-3),
        ([1e-12], 1e-8),
        ([0.002, 0.5], 1e-3),
    ],
)
def test_prices_begin_at_a_power_of_ten_below_them(
    stage: Stage, prices: list[float], floor: float
) -> None:
    assert stage.call("prices", "m.lowest(prices)", prices=prices) == pytest.approx(floor)


@pytest.mark.parametrize(
    ("limit", "is_near"), [(None, False), (-2.1, False), (-2.0, True), (-1.8, True), (-1.7, False)]
)
def test_budget_is_near_where_it_would_strike_a_note_through(
    stage: Stage, limit: float | None, is_near: bool
) -> None:
    found = stage.call("prices", "m.isJustBelow(limit, -2, 100)", limit=limit)
    assert found == is_near


@pytest.mark.parametrize(("power", "text"), [(-6, "10⁻⁶"), (-10, "10⁻¹⁰"), (0, "10⁰"), (3, "10³")])
def test_powers_of_ten_are_written_short(stage: Stage, power: int, text: str) -> None:
    assert stage.call("axes", "m.tenTo(power)", power=power) == text


@pytest.mark.parametrize(
    ("epsilon", "position"),
    [(0.0, 0.0), (0.001, 0.0), (0.003, 0.0), (0.03, 0.5), (0.3, 1.0), (0.9, 1.0), (None, None)],
)
def test_epsilon_lies_on_a_logarithmic_scale(
    stage: Stage, epsilon: float | None, position: float | None
) -> None:
    cell = {"cos": 1.0, "epsilon": epsilon, "rung": "alias"}
    found = stage.call("measures", "m.measure('epsilon', []).position(cell)", cell=cell)
    assert found == (None if position is None else pytest.approx(position))


@pytest.mark.parametrize(("cos", "position"), [(1.0, 0.0), (0.9999, 0.4), (0.9, 1.0), (-1.0, 1.0)])
def test_cosine_lies_on_the_scale_of_its_distance_from_one(
    stage: Stage, cos: float, position: float
) -> None:
    cell = {"cos": cos, "epsilon": 0.1, "rung": "alias"}
    found = stage.call("measures", "m.measure('cos', []).position(cell)", cell=cell)
    assert found == pytest.approx(position, abs=1e-6)


@pytest.mark.parametrize(
    ("cos", "text"),
    [
        (None, "\u2013"), (1.0, "1"), (0.5, "0.50000"), (0.99996, "0.99996"),
        (0.99999996, "0.99999996"), (1 - 1e-12, "1"),
    ],
)  # fmt: skip
def test_cosine_has_digits_enough(stage: Stage, cos: float | None, text: str) -> None:
    assert stage.call("measures", "m.cosine(cos)", cos=cos) == text


def test_ends_of_rows_are_sums_and_counts_of_what_is_known(stage: Stage) -> None:
    rungs = ("alias", "alias", "own", "rank8")
    cells = [
        {"rung": rung, "unique_bytes": size}
        for rung, size in zip(rungs, (0, 24, 1000, None), strict=True)
    ]
    call = "['rung', 'bytes', 'epsilon', 'cos'].map((by) => m.rowEnd(by, cells, null))"
    assert stage.call("measures", call, cells=cells) == ["2 · 1 · 1", "1.0 KiB", "", ""]


def test_bytes_are_measured_by_the_largest_cell(stage: Stage) -> None:
    cells = [{"unique_bytes": size} for size in (0, 50, 200, None)]
    found = stage.call("measures", "cells.map(m.measure('bytes', cells).position)", cells=cells)
    assert found == [0, 0.25, 1, None]


@pytest.mark.parametrize(("rung", "kind"), [("alias", ""), ("own", "■"), ("rank8:8+signs:64", "○")])
def test_every_residual_has_the_same_mark(stage: Stage, rung: str, kind: str) -> None:
    assert stage.call("measures", "m.rungMark({rung})", rung=rung) == kind


@pytest.mark.parametrize(
    ("largest", "texts"),
    [
        (0, ["0"]),
        (900, ["0", "200 B", "400 B", "600 B", "800 B"]),
        (2.2 * KIB**2, ["0", "0.5 MiB", "1 MiB", "1.5 MiB", "2 MiB"]),
        (12.5 * KIB**3, ["0", "2.5 GiB", "5 GiB", "7.5 GiB", "10 GiB", "12.5 GiB"]),
    ],
)
def test_ticks_of_bytes_are_round_in_their_unit(
    stage: Stage, largest: float, texts: list[str]
) -> None:
    assert stage.call("axes", "m.byteTicks(largest).ticktext", largest=largest) == texts


@pytest.mark.parametrize(
    ("value", "limit", "text"),
    [
        (0.00999, 0.01, "0.00999"),
        (0.0099996, 0.01, "0.0099996"),
        (0.01, 0.01, "0.01"),
        (0.0081234, 0.01, "0.00812"),
        (0.0081234, None, "0.00812"),
        (0, 0.01, "0"),
    ],
)
def test_a_price_has_digits_that_tell_it_from_its_budget(
    stage: Stage, value: float, limit: float | None, text: str
) -> None:
    assert stage.call("format", "m.beside(value, limit)", value=value, limit=limit) == text


def test_columns_of_cosines_name_models_alike(stage: Stage) -> None:
    names = ["acme/b", "organisation/a-model"]
    shown = {"names": names, "matrix": [[1, 0.5], [0.5, 1]], "at": None}
    make = "m.cosineCells({...shown, describe: () => []})(320).layout.xaxis.ticktext"
    first, second = stage.call("shares", make, shown=shown)
    assert first == "b"
    assert not second.startswith("organisation")


def test_bytes_that_span_much_are_on_an_axis_of_powers(stage: Stage) -> None:
    sizes = [KIB**2, 4 * KIB**2, 200 * KIB**2]
    axis = stage.call("byte_axis", "m.byteAxis(sizes, 7).xaxis", sizes=sizes)
    assert axis["type"] == "log"
    assert axis["ticktext"] == ["1 MiB", "4 MiB", "16 MiB", "64 MiB", "256 MiB"]
    near = stage.call("byte_axis", "m.byteAxis(sizes, 7).xaxis", sizes=[0, *sizes])
    assert "type" not in near  # there is no room for none at all


def test_a_long_name_is_cut_to_its_room_from_its_last_part(stage: Stage) -> None:
    name = "an-organisation/a-very-long-name-of-a-model"
    cut = stage.call("axes", "m.shortName(name, 120)", name=name)
    assert cut.endswith("…")
    assert name.rpartition("/")[2].startswith(cut[:-1])
    assert len(cut) > 8
    assert stage.call("axes", "m.shortName(name, 2000)", name=name) == name


def test_colours_stay_with_their_models(stage: Stage) -> None:
    variants: list[dict[str, Any]] = [
        card(f"v{place}", donor="base", unique=1) | {"created_at": place} for place in range(9)
    ]
    given = "m.giveColours(models); return models.map(m.modelColour)"
    call = f"(() => {{ {given}; }})()"
    before = stage.call("palette", call, models=variants)
    assert len({(colour["token"], colour["pattern"]) for colour in before}) == 9
    assert before[8]["token"] == before[0]["token"]  # told apart by its pattern
    newer = card("newer", donor="base", unique=1) | {"created_at": -1.0}
    after = stage.call("palette", call, models=[newer, *variants[4:]])
    assert after[1:] == before[4:]
    assert after[0] not in before


def test_donors_differ_in_their_patterns(stage: Stage) -> None:
    donors = [card(f"d{place}", unique=1) | {"created_at": place} for place in range(3)]
    call = "(() => { m.giveColours(models); return models.map(m.modelColour); })()"
    colours = stage.call("palette", call, models=donors)
    assert {colour["token"] for colour in colours} == {"--c-donor"}
    assert len({colour["pattern"] for colour in colours}) == 3


def test_tensors_become_rows_of_parameters(stage: Stage) -> None:
    def tensor(block: int | None, parameter: str, epsilon: float | None) -> dict[str, Any]:
        name = f"{block}.{parameter}"
        found = {"name": name, "block": block, "parameter": parameter, "epsilon": epsilon}
        return found | {"section": "blocks", "cos": 1.0, "rung": "own"}

    tensors = [
        tensor(None, "model.norm.weight", 0.9),
        tensor(1, "mlp.up_proj.weight", 0.4),
        tensor(0, "input_layernorm.weight", None),
        tensor(0, "self_attn.q_proj.weight", 0.1),
        tensor(1, "self_attn.q_proj.weight", 0.3),
    ]
    rows = stage.call("tensors", "m.tensorRows(tensors)", tensors=tensors)
    assert [row["name"] for row in rows] == ["q_proj", "up_proj", "input_layernorm"]
    assert [row["note"] for row in rows] == ["0.2", "0.4", ""]
    assert [cell and cell["epsilon"] for cell in rows[1]["cells"]] == [None, 0.4]
    assert stage.call("tensors", "m.worstOf(rows).name", rows=rows) == "1.mlp.up_proj.weight"
