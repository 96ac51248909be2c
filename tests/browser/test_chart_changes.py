"""Charts while what they show changes: a model goes, another is chosen, nothing comes."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.stage import CHARTS, ORIGIN, Stage, card, staged

FAMILY = [card("base", unique=1000), *(card(n, donor="base", unique=100) for n in ("a", "b"))]
_FORGET = """async (id) => {
  const {store, changed} = await import("/ui/store.js");
  store.models.delete(id);
  store.details.delete(id);
  changed("models", "details");
}"""


def details() -> dict[str, dict[str, Any]]:
    block = {"index": 0, "cos": 0.99, "epsilon": 0.01, "rung": "alias", "unique_bytes": 1}
    return {name: {"blocks": [block], "frontier": None} for name in ("a", "b")}


def tensors(route: Route) -> None:
    """Answers for `a`, and knows nothing of any other."""
    tensor = {
        "name": "t", "section": "blocks", "block": 0, "parameter": "mlp.up_proj.weight",
        "cos": 0.9, "epsilon": 0.1, "rung": "own",
    }  # fmt: skip
    known = "/models/a?" in route.request.url
    route.fulfill(json={"details": {"tensors": [tensor] if known else None}})


def weights(stage: Stage) -> Page:
    stage.page.route(f"{ORIGIN}/models/**", tensors)
    stage.play("diagnostics", FAMILY, details())
    expect(stage.page.get_by_role("img", name="Tensors of a; the farthest is t")).to_be_visible()
    return stage.page


def test_choosing_a_variant_leaves_the_focus_on_its_name(browser: Browser) -> None:
    with staged(browser) as stage:
        page = weights(stage)
        name = page.get_by_role("button", name="b", exact=True)
        name.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_text("Nothing is known of its tensors.")).to_be_visible()
        expect(name).to_be_focused()


def test_tensors_of_one_variant_are_not_left_standing_for_another(browser: Browser) -> None:
    with staged(browser) as stage:
        page = weights(stage)
        chooser = page.get_by_role("combobox", name="Variant")
        chooser.select_option("b")
        expect(page.get_by_text("Nothing is known of its tensors.")).to_be_visible()
        expect(page.get_by_role("img", name="Tensors of")).to_have_count(0)
        chooser.select_option("a")
        expect(page.get_by_role("img", name="Tensors of a;")).to_be_visible()
        expect(page.get_by_text("Nothing is known of its tensors.")).to_have_count(0)


def test_keyboard_stays_among_the_rows_that_there_are(browser: Browser) -> None:
    with staged(browser) as stage:
        page = stage.page
        stage.play("heatmap", FAMILY, details())
        chart = page.get_by_role("group", name="Variants by blocks. Arrow keys")
        expect(chart.locator("svg").first).to_be_attached()
        chart.focus()
        page.keyboard.press("ArrowDown")
        readout = page.locator("#heatmap [aria-live]")
        expect(readout).to_contain_text("b, block 0")
        page.evaluate(_FORGET, "b")
        expect(page.get_by_role("img", name="1 variant by 1 block")).to_be_visible()
        page.keyboard.press("Enter")
        expect(readout).to_contain_text("a, block 0")


def test_chart_is_walked_through_without_the_library(browser: Browser) -> None:
    with staged(browser, frozenset({CHARTS})) as stage:
        page = stage.page
        stage.play("heatmap", FAMILY, details())
        expect(page.get_by_text("The charts could not be loaded")).to_be_visible()
        page.get_by_role("group", name="Variants by blocks. Arrow keys").focus()
        page.keyboard.press("ArrowDown")
        expect(page.locator("#heatmap [aria-live]")).to_contain_text("b, block 0")
        page.evaluate("new Promise((resolve) => setTimeout(resolve))")  # what was thrown is told
