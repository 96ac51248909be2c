"""The charts' sections over records of our making: what they show, and what they say of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.browser.chromium import until
from tests.browser.stage import CHARTS, Stage, card, staged

HOSTILE = "<img src=x onerror=alert(1)>&amp;<b>bold</b>"
SHORT = "<b>x&amp;"
_FAIL_ONCE = """() => {
  const {react} = Plotly;
  Plotly.react = () => { Plotly.react = react; return Promise.reject(new Error("no")); };
}"""
_CHANGE = """async () => (await import("/ui/store.js")).changed("models")"""
_TELL = """async () => {
  const {store, changed} = await import("/ui/store.js");
  for (const topic of ["models", "details", "studies"]) store.told.add(topic);
  changed("models", "details", "studies");
}"""
NAMES_OF_SCALES = {"epsilon": "ε", "cos": "1 \u2212 cos", "rung": "rung", "bytes": "bytes"}


@pytest.fixture
def stage(browser: Browser) -> Iterator[Stage]:
    with staged(browser) as opened:
        yield opened


def block(index: int, *, epsilon: float, rung: str = "alias") -> dict[str, Any]:
    return {"index": index, "cos": 0.999, "epsilon": epsilon, "rung": rung, "unique_bytes": 2048}


def two_variants() -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns a donor and two variants, and their blocks."""
    models = [
        card("base", unique=1000),
        card("a", donor="base", unique=100),
        card("b", donor="base", unique=200) | {"created_at": 2.0},
    ]
    details: dict[str, dict[str, Any]] = {
        name: {"blocks": [block(0, epsilon=near), block(1, epsilon=far, rung="own")]}
        for name, near, far in (("a", 0.01, 0.02), ("b", 0.03, 0.25))
    }
    plan = {"kl": 0.002, "kl_upper": 0.003, "rung_bytes": {}, "chosen": True, "unique_bytes": 100}
    for name in details:
        other = plan | {"unique_bytes": 900, "kl": 0.0, "kl_upper": 0.0, "chosen": False}
        details[name]["frontier"] = [other, plan]
    return models, details


def test_map_says_what_is_saved(stage: Stage) -> None:
    models, _ = two_variants()
    stage.play("map", models)
    tile = stage.page.locator(".tile", has_text="Saved")
    expect(tile.locator(".tile-value")).to_have_text("1.7 KiB")
    expect(tile.locator(".tile-note")).to_have_text("57 % of separate copies")
    chart = stage.page.get_by_role("img", name="3 models hold 1.3 KiB; separate copies would take")
    expect(chart.locator("svg").first).to_be_attached()
    stage.page.locator("#map summary").first.click()
    row = stage.page.get_by_role("row", name="b 1000 B 200 B 800 B 800 B 80.0 %")
    expect(row).to_be_visible()


def test_map_does_not_praise_what_saves_nothing(stage: Stage) -> None:
    stage.play("map", [card("base", unique=1000)])
    tile = stage.page.locator(".tile", has_text="Saved")
    expect(tile.locator(".tile-value")).to_have_text("0 B")
    colours = stage.page.locator(".tile-value").evaluate_all(
        "values => values.map((value) => getComputedStyle(value).color)"
    )
    assert len(set(colours)) == 1
    expect(stage.page.get_by_role("img", name="1 model holds 1000 B;")).to_be_attached()


def test_map_tells_donors_apart(stage: Stage) -> None:
    stage.play("map", [card("one", unique=1000), card("two", unique=900)])
    keys = stage.page.locator("#map figure").first.locator(".legend .swatch")
    expect(keys).to_have_count(2)
    looks = keys.evaluate_all("keys => keys.map((key) => getComputedStyle(key).backgroundImage)")
    assert looks[0] != looks[1]


def test_map_without_models_says_so(stage: Stage) -> None:
    stage.play("map", [])
    expect(stage.page.get_by_text("No model is resident yet")).to_be_visible()
    expect(stage.page.locator("#map figure >> visible=true")).to_have_count(0)


@pytest.mark.parametrize("section", ["map", "heatmap", "frontier", "diagnostics", "study"])
def test_nothing_is_said_of_a_server_that_has_told_of_nothing(stage: Stage, section: str) -> None:
    stage.play(section, None)
    stage.page.evaluate("new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)))")
    expect(stage.page.locator(f"#{section}")).to_have_text("", use_inner_text=True)
    stage.page.evaluate(_TELL)
    expect(stage.page.locator(f"#{section} .nothing")).to_be_visible()


def test_names_are_text_in_every_chart(stage: Stage) -> None:
    names = (HOSTILE, SHORT)
    stage.play("map", [card("base", unique=9), *(card(n, donor="base", unique=3) for n in names)])
    expect(stage.page.locator("#map .legend").get_by_text(HOSTILE)).to_be_visible()
    expect(stage.page.locator("#map .ytick").get_by_text(SHORT, exact=True)).to_have_count(1)
    assert stage.page.locator("#map img, #map tspan[style]").count() == 0


def test_heatmap_is_walked_through_by_arrow_keys(stage: Stage) -> None:
    stage.play("heatmap", *two_variants())
    page = stage.page
    expect(page.locator("#heatmap .plot svg").first).to_be_attached()
    page.locator("#heatmap select").focus()
    page.keyboard.press("Tab")
    said = page.locator("#heatmap [aria-live]")
    expect(said).to_have_text("a, block 0, rung alias, ε 0.01, cos 0.99900, 2.0 KiB of its own")
    for key in ("ArrowDown", "ArrowDown", "End"):  # the second is one too many
        page.keyboard.press(key)
    expect(said).to_contain_text("b, block 1, rung own, ε 0.25")
    expect(page.locator("#heatmap .hoverlayer")).to_contain_text("b, block 1")
    page.keyboard.press("Enter")
    expect(page.locator("#heatmap .ytick text", has_text="▸")).to_have_text("▸ b")
    page.keyboard.press("Tab")
    expect(said).to_have_text("")


def test_heatmap_names_its_farthest_block(stage: Stage) -> None:
    stage.play("heatmap", *two_variants())
    chart = stage.page.get_by_role(
        "img", name="2 variants by 2 blocks; the farthest is block 1 of b"
    )
    expect(chart).to_be_attached()


def test_heatmap_table_has_every_block(stage: Stage) -> None:
    stage.play("heatmap", *two_variants())
    stage.page.locator("#heatmap summary").click()
    expect(stage.page.locator("#heatmap tbody tr")).to_have_count(4)
    expect(stage.page.get_by_role("row", name="b 1 own 0.25 0.99900 2.0 KiB")).to_be_visible()


@pytest.mark.parametrize(
    ("measure", "heading", "ends"),
    [
        ("epsilon", "mean ε", ["0.03", "0.03"]),
        ("cos", "mean cos", ["0.99900", "0.99900"]),
        ("rung", "alias · res. · own", ["1 · 0 · 1", "1 · 0 · 1"]),
        ("bytes", "together", ["4.0 KiB", "4.0 KiB"]),
    ],
)
def test_rows_of_the_heatmap_end_with_what_they_are_coloured_by(
    stage: Stage, measure: str, heading: str, ends: list[str]
) -> None:
    stage.play("heatmap", *two_variants())
    stage.page.locator("#heatmap select").select_option(measure)
    expect(stage.page.locator("#heatmap .annotation-text")).to_have_text([heading, *ends])


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("measure", ["epsilon", "cos", "rung", "bytes"])
def test_ticks_of_a_scale_leave_each_other_room(stage: Stage, measure: str, width: int) -> None:
    stage.page.set_viewport_size({"width": width, "height": 900})
    stage.play("heatmap", *two_variants())
    stage.page.locator("#heatmap select").select_option(measure)
    expect(stage.page.locator("#heatmap .scale-name")).to_have_text(NAMES_OF_SCALES[measure])
    boxes = stage.page.locator("#heatmap .scale-ticks > span").evaluate_all(
        "ticks => ticks.map((tick) => tick.getBoundingClientRect())"
        ".map(({left, right}) => [left, right])"
    )
    assert len(boxes) >= 3
    for (_, end), (start, _) in pairwise(boxes):
        assert start - end >= 2, boxes


def test_chart_has_its_room_before_its_library_has_come(stage: Stage) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    stage.page.route(f"**/{CHARTS}", hold)
    stage.play("map", two_variants()[0])
    place = stage.page.locator("#map .plot").first
    expect(place).to_have_attribute("style", re.compile("height: [1-9]"))
    height = place.evaluate("place => place.style.height")
    until(stage.page, lambda: bool(held))
    held[0].fallback()
    expect(place.locator("svg").first).to_be_attached()
    assert place.evaluate("place => place.style.height") == height


def test_a_table_that_is_cut_off_is_scrolled_with_the_keyboard(stage: Stage) -> None:
    stage.page.set_viewport_size({"width": 390, "height": 900})
    models = [card("base", unique=1000), card("a" * 60, donor="base", unique=100)]
    plan = models[1]["plan"] | {"rung_bytes": dict.fromkeys(("int2", "int3", "int4", "own"), 9)}
    models[1]["plan"] = plan
    stage.play("map", models)
    stage.page.locator("#map summary").nth(1).click()
    table = stage.page.get_by_role("region", name="What each variant holds to itself: table")
    expect(table.get_by_role("row")).to_have_count(2)
    assert table.evaluate("box => box.scrollWidth > box.clientWidth")
    table.focus()
    stage.page.keyboard.press("ArrowRight")
    stage.page.wait_for_function(
        "() => document.activeElement.matches('.table-scroll')"
        " && document.activeElement.scrollLeft > 0"
    )


def test_frontier_shows_the_variant_that_is_chosen(stage: Stage) -> None:
    stage.play("frontier", *two_variants())
    page = stage.page
    expect(page.get_by_role("img", name="2 priced plans of a; chosen: 100 B")).to_be_attached()
    page.locator("#frontier select").select_option("b")
    expect(page.get_by_role("img", name="2 priced plans of b")).to_be_attached()
    expect(page.locator("#frontier dd").first).to_have_text("200 B")
    expect(page.locator("#frontier .annotation-text", has_text="chosen")).to_be_attached()
    expect(page.locator("#frontier .annotation-text", has_text="budget 0.01")).to_be_attached()


def test_frontier_without_priced_plans_says_so(stage: Stage) -> None:
    models, details = two_variants()
    stage.play("frontier", models, {name: {"blocks": [], "frontier": None} for name in details})
    expect(stage.page.get_by_text("No variant has been priced yet")).to_be_visible()


def test_rings_are_named_in_their_colours_with_their_own_budgets(stage: Stage) -> None:
    models, details = two_variants()
    models[2]["plan"] = models[2]["plan"] | {"budget_kl": 0.05}
    stage.play("frontier", models, details)
    keys = stage.page.locator("#frontier .legend li")
    expect(keys).to_have_text(
        ["no plan of a is smaller and truer", "its other plans", "b (budget 0.05)"]
    )
    ring = keys.last.locator(".swatch").evaluate("ring => getComputedStyle(ring).borderTopColor")
    drawn = stage.page.locator("#frontier .scatterlayer path.point[style*='fill: none']").first
    expect(drawn).to_be_attached()
    assert drawn.evaluate("point => getComputedStyle(point).stroke") == ring
    note = stage.page.locator("#frontier .figure-note").first
    expect(note).to_contain_text("each priced against a budget of its own")


def test_frontier_is_drawn_where_nothing_costs_anything(stage: Stage) -> None:
    models, details = two_variants()
    models[1]["plan"] = models[1]["plan"] | {"budget_kl": 0.0}
    for plan in details["a"]["frontier"]:
        plan |= {"kl": 0.0, "kl_upper": 0.0}
    stage.play("frontier", models, details)
    expect(stage.page.locator("#frontier .plot .point").first).to_be_visible()
    expect(stage.page.locator("#frontier .ytick text").first).to_contain_text("≤ 10⁻⁷")
    expect(stage.page.locator("#frontier .annotation-text", has_text="budget 0")).to_be_visible()


def test_without_the_chart_library_tables_are_opened(browser: Browser) -> None:
    with staged(browser, missing=frozenset({CHARTS})) as stage:
        stage.play("heatmap", *two_variants())
        expect(stage.page.get_by_role("status").first).to_contain_text("could not be loaded")
        expect(stage.page.locator("#heatmap tbody tr")).to_have_count(4)


def test_library_is_asked_for_again_once_it_can_be_had(browser: Browser) -> None:
    with staged(browser, missing=frozenset({CHARTS})) as stage:
        stage.play("heatmap", *two_variants())
        failure = stage.page.locator("#heatmap figure > [role=status]")
        expect(failure).to_contain_text("could not be loaded")
        stage.mend()
        stage.page.locator("#heatmap select").select_option("cos")
        expect(stage.page.locator("#heatmap .plot svg").first).to_be_attached()
        expect(failure).to_have_text("")


def test_place_that_was_gone_to_before_the_chart_was_drawn_has_its_label(browser: Browser) -> None:
    with staged(browser, missing=frozenset({CHARTS})) as stage:
        stage.play("heatmap", *two_variants())
        failure = stage.page.locator("#heatmap figure > [role=status]")
        expect(failure).to_contain_text("could not be loaded")
        stage.mend()
        stage.page.get_by_role("group", name="Variants by blocks. Arrow keys").focus()
        stage.page.keyboard.press("ArrowDown")
        expect(stage.page.locator("#heatmap .hoverlayer")).to_contain_text("b, block 0")


def test_nobody_is_read_what_the_library_measures_with(stage: Stage) -> None:
    stage.play("heatmap", *two_variants())
    expect(stage.page.locator("#js-plotly-tester")).to_have_attribute("aria-hidden", "true")


def test_a_drawing_that_failed_is_tried_again(stage: Stage) -> None:
    stage.play("heatmap", *two_variants())
    expect(stage.page.locator("#heatmap .plot svg").first).to_be_attached()
    stage.page.evaluate(_FAIL_ONCE)
    stage.page.locator("#heatmap select").select_option("bytes")
    failure = stage.page.locator("#heatmap figure > [role=status]")
    expect(failure).to_contain_text("could not be loaded")
    stage.page.evaluate(_CHANGE)
    expect(failure).to_have_text("")
    ends = stage.page.locator("#heatmap .annotation-text")
    expect(ends.first).to_have_text("together")
