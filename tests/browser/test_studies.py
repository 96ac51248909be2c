"""The sections of a family's study over records of our making: what they show and say of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, ViewportSize, expect

from tests.browser.parts import go_to, open_tables
from tests.browser.stage import CHARTS, Stage, staged
from tests.browser.studies import answer_studies, study_card
from tests.browser.visitor import NARROW, WIDE, Visitor
from tests.server.live import LiveServer
from tests.server.summaries import COMPONENTS, summary_of

HOSTILE = "<img src=x onerror=alert(1)>&amp;<b>bold</b>"
SECTIONS = ("study", "direction", "fine_tunes")
THREE = ("a", "b", "c")
_NOW = "async () => (await import('/ui/store.js')).changed('studies')"


@pytest.fixture
def stage(browser: Browser) -> Iterator[Stage]:
    with staged(browser) as opened:
        yield opened


def play(stage: Stage, *studies: dict[str, Any], sections: tuple[str, ...] = SECTIONS) -> None:
    for section in sections:
        stage.play(section, [], studies=studies)


def test_share_stands_beside_its_null(stage: Stage) -> None:
    play(stage, study_card("base", *THREE), sections=("study", "direction"))
    tile = stage.page.locator(".tile", has_text="PC1, centred")
    expect(tile.locator(".tile-value")).to_have_text("68.0 %")
    expect(tile.locator(".tile-note")).to_have_text("its null: 95 % are below 44.0 %")
    chart = stage.page.get_by_role("img", name="PC1 of 10 components, centred; beyond its null: q")
    expect(chart.locator(".barlayer .point")).to_have_count(len(COMPONENTS))
    expect(chart.locator(".scatterlayer .point")).to_have_count(len(COMPONENTS))


def test_tensors_beyond_their_null_are_of_the_kind_of_pc1_beside_them(stage: Stage) -> None:
    summary = summary_of("base", *THREE)
    summary["components"]["all"] |= {"significant_share": 1.0, "significant_share_centred": 0.25}
    play(stage, study_card("base", *THREE, summary=summary), sections=("study",))
    tile = stage.page.locator(".tile", has_text="Tensors beyond their null")
    expect(tile.locator(".tile-value")).to_have_text("25 %")
    expect(tile.locator(".tile-note")).to_contain_text("centred PC1")


def test_share_that_is_not_beyond_its_null_looks_otherwise(stage: Stage) -> None:
    summary = summary_of("base", *THREE)
    for row in summary["components"].values():
        row["pc1_centred"] = row["null95_centred"] - 0.01
    for name in ("q", "up"):
        summary["components"][name]["pc1_centred"] = 0.9
    play(stage, study_card("base", *THREE, summary=summary), sections=("direction",))
    chart = stage.page.get_by_role("img", name="beyond its null: q, up.")
    expect(chart.locator(".barlayer .point path").first).to_be_attached()
    fills = chart.locator(".barlayer .point path").evaluate_all(
        "bars => bars.map((bar) => getComputedStyle(bar).fill)"
    )
    within = fills[COMPONENTS.index("k")]
    beyond = {place for place, fill in enumerate(fills) if fill != within}
    assert beyond == {COMPONENTS.index("q"), COMPONENTS.index("up")}


@pytest.mark.parametrize(
    ("way", "first"),
    [
        ("_centred", "q 4 50.0 % 48.0 % to 52.0 % 35.0 % 75 % 50 %"),
        ("", "q 4 51.0 % 49.0 % to 53.0 % 36.0 % 75 % 50 %"),
        ("_normalised", "q 4 49.0 % 47.0 % to 51.0 % 34.0 % 75 % 50 %"),
        ("_normalised_centred", "q 4 48.0 % 46.0 % to 50.0 % 33.0 % 75 % 50 %"),
    ],
)
def test_shares_are_told_as_they_are_reckoned(stage: Stage, way: str, first: str) -> None:
    play(stage, study_card("base", *THREE), sections=("direction",))
    stage.page.locator("#direction select").select_option(way)
    stage.page.locator("#direction summary").first.click()
    expect(stage.page.get_by_role("row", name=first, exact=True)).to_be_visible()
    expect(stage.page.locator("#direction tbody tr")).to_have_count(len(COMPONENTS))


def test_share_that_one_fine_tune_carries_alone_is_told_of(stage: Stage) -> None:
    summary = summary_of("base", *THREE)
    play(stage, study_card("base", *THREE, summary=summary), sections=("direction",))
    figure = stage.page.locator("#direction figure").first
    expect(figure.locator("svg").first).to_be_attached()
    expect(figure).not_to_contain_text("so much larger")
    summary["diagnostics"].append({"kind": "single_source", "model": "b", "reason": "It is large."})
    put = "store.studies.set(study.family, study)"
    told = study_card("base", *THREE, summary=summary)
    stage.call("store", f"(({{store}}) => {put})(m)", study=told)
    stage.page.evaluate(_NOW)
    expect(figure).to_contain_text("b is so much larger than the rest that PC1 is mostly that")


def test_share_without_a_null_is_not_drawn(stage: Stage) -> None:
    summary = summary_of("base", *THREE)
    summary["components"]["q"]["null95_centred"] = None
    pairs = stage.call("direction", "m.sharePairs(summary, '_centred')", summary=summary)
    assert [pair["name"] for pair in pairs] == list(COMPONENTS[1:])


def test_two_fine_tunes_have_a_shared_fraction_and_no_share(stage: Stage) -> None:
    play(stage, study_card("base", "a", "b"))
    tile = stage.page.locator(".tile", has_text="Shared fraction")
    expect(tile.locator(".tile-value")).to_have_text("61.0 %")
    expect(stage.page.get_by_text("Principal components begin with three")).to_be_visible()
    expect(stage.page.get_by_role("img", name="PC1 of")).to_have_count(0)
    expect(stage.page.get_by_role("img", name="Weights of the kernel")).to_be_attached()


def test_components_are_walked_through_by_arrow_keys(stage: Stage) -> None:
    play(stage, study_card("base", *THREE), sections=("direction",))
    page = stage.page
    expect(page.locator("#direction .plot svg").first).to_be_attached()
    page.locator("#direction select").focus()
    page.keyboard.press("Tab")
    said = page.locator("#direction [aria-live]").first
    expect(said).to_have_text(
        "q: PC1 50.0 % (48.0 % to 52.0 %), its null: 95 % are below 35.0 %,"
        " 50 % of 4 tensors beyond their own null"
    )
    page.keyboard.press("ArrowDown")
    expect(said).to_contain_text("k: PC1 52.0 %")


def test_layers_are_walked_through_and_their_gaps_are_told(stage: Stage) -> None:
    play(stage, study_card("base", *THREE), sections=("direction",))
    page = stage.page
    frame = page.get_by_role("group", name="Attention less MLP, layer by layer")
    expect(frame.locator("svg").first).to_be_attached()
    page.locator("#direction summary").first.focus()
    page.keyboard.press("Tab")
    expect(frame).to_be_focused()
    page.keyboard.press("End")
    said = page.locator("#direction [aria-live]").nth(1)
    expect(said).to_have_text("layer 3, difference of shares -0.01")


def test_layer_without_a_number_is_a_gap_in_its_curve(stage: Stage) -> None:
    summary = summary_of("base", *THREE)
    summary["kernel"]["weights_per_layer"] = [0.5, 0.51, None, 0.53, 0.54]
    play(stage, study_card("base", *THREE, summary=summary), sections=("direction",))
    chart = stage.page.get_by_role("img", name="5 layers, from 0.5, 0.51, \u2013, 0.53, 0.54")
    expect(chart.locator(".scatterlayer .point")).to_have_count(4)
    expect(chart.locator(".scatterlayer path.js-line")).to_have_count(2)
    stage.page.locator("#direction summary").last.click()
    expect(stage.page.get_by_role("row", name="2 \u2013", exact=True)).to_be_visible()


def test_every_fine_tune_has_its_row(stage: Stage) -> None:
    play(stage, study_card("base", *THREE), sections=("fine_tunes",))
    rows = stage.page.get_by_role("table", name="What each fine-tune added").get_by_role("row")
    expect(rows).to_have_count(4)
    expect(rows.nth(1)).to_have_text("acore1.50.0130 %0.990.8near unity")
    expect(rows.nth(2)).to_have_text("bperiphery2.50.0240 %0.940.75none")


def test_findings_are_told_with_their_reasons(stage: Stage) -> None:
    play(stage, study_card("base", *THREE), sections=("fine_tunes",))
    found = stage.page.locator(".findings li")
    expect(found).to_have_text(
        ["near unity a: Its cosine is 0.9999.", "monoculture c: Its mean cosine is 0.9."]
    )


def test_study_without_findings_has_no_list_of_them(stage: Stage) -> None:
    summary = summary_of("base", *THREE, diagnostics=[])
    play(stage, study_card("base", *THREE, summary=summary), sections=("fine_tunes",))
    expect(stage.page.get_by_role("table", name="What each fine-tune added")).to_be_visible()
    expect(stage.page.get_by_role("heading", name="Findings")).to_be_hidden()


def test_cosines_are_walked_through_pair_by_pair(stage: Stage) -> None:
    play(stage, study_card("base", *THREE), sections=("fine_tunes",))
    page = stage.page
    chart = page.get_by_role("img", name="Cosines between 3 fine-tunes; their mean is 0.417")
    expect(chart.locator("svg").first).to_be_attached()
    page.get_by_role("region", name="What each fine-tune added").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    said = page.locator("#fine_tunes [aria-live]")
    expect(said).to_have_text("a and b, cos 0.50000, unrelated ones stay below 0.05")
    for key in ("ArrowDown", "Home"):
        page.keyboard.press(key)
    expect(said).to_contain_text("b and a")


def test_progress_of_a_study_is_shown(stage: Stage) -> None:
    progress = {"done_tensors": 12, "total_tensors": 56}
    running = study_card("base", *THREE, state="running", progress=progress, summary=None)
    play(stage, running)
    expect(stage.page.locator("#study [role=status]")).to_have_text("12 of 56 tensors")
    bar = stage.page.get_by_role("progressbar", name="Progress of the study")
    assert bar.evaluate("bar => [bar.value, bar.max]") == [12, 56]
    expect(stage.page.locator("#direction")).to_be_hidden()
    expect(stage.page.locator("#fine_tunes")).to_be_hidden()


def test_study_of_models_that_changed_says_so(stage: Stage) -> None:
    card = study_card(
        "base", *THREE, state="waiting", reason="a model is loading", is_current=False
    )
    play(stage, card | {"same_weights": {"copy": "a"}})
    expect(stage.page.locator("#study .chip")).to_have_text("waiting")
    said = stage.page.locator("#study [role=status]")
    expect(said).to_contain_text("a model is loading · 28 tensors of 3 fine-tunes, studied")
    expect(said).to_contain_text("before its models changed")
    expect(stage.page.locator("#study")).to_contain_text("copy has the weights of a")


def test_study_that_failed_says_why(stage: Stage) -> None:
    error = {"code": "bad_checkpoint", "message": "a.safetensors is cut off.", "param": None}
    play(stage, study_card("base", *THREE, state="failed", error=error, summary=None))
    expect(stage.page.locator("#study .chip")).to_have_text("failed")
    expect(stage.page.get_by_text("a.safetensors is cut off.")).to_be_visible()


def test_fine_tunes_that_are_left_out_are_named_with_their_reasons(stage: Stage) -> None:
    error = {"code": "bad_checkpoint", "message": "d: its file is cut off.", "param": None}
    play(stage, study_card("base", *THREE, left_out={"d": error}), sections=("study",))
    expect(stage.page.get_by_text("Left out: d: its file is cut off.")).to_be_visible()
    expect(stage.page.locator("#study .chip")).to_have_text("done")


def test_family_whose_fine_tunes_are_all_left_out_says_why_once(stage: Stage) -> None:
    error, other = (
        {"code": "bad_checkpoint", "message": f"{name}: it is cut off.", "param": None}
        for name in ("a", "b")
    )
    left_out = {"a": error, "b": other}
    play(stage, study_card("base", state="failed", error=error, left_out=left_out, summary=None))
    said = stage.page.locator("#study .under.bad")
    expect(said).to_have_text("Left out: a: it is cut off. Left out: b: it is cut off.")


def test_only_the_study_that_is_shown_is_fetched(showroom: LiveServer, visitor: Visitor) -> None:
    page = visitor.open(showroom).page
    first, second = "acme/first #1", "acme/second"
    asked = answer_studies(page, study_card(first, *THREE), study_card(second, "x", "y", "z"))
    go_to(page, "Analysis")
    table = page.get_by_role("table", name="What each fine-tune added")
    expect(table.get_by_role("rowheader", name="a", exact=True)).to_be_visible()
    assert asked == [first]
    select = page.locator("#study select")
    select.select_option(second)
    expect(table.get_by_role("rowheader", name="x", exact=True)).to_be_visible()
    select.select_option(first)
    expect(table.get_by_role("rowheader", name="a", exact=True)).to_be_visible()
    assert asked == [first, second]  # what was fetched is kept


def test_without_families_there_is_one_sentence(stage: Stage) -> None:
    play(stage)
    expect(stage.page.get_by_text("Two fine-tunes of a model are studied once")).to_be_visible()
    for section in ("direction", "fine_tunes"):
        expect(stage.page.locator(f"#{section}")).to_be_hidden()


def test_another_family_is_chosen(stage: Stage) -> None:
    waiting = study_card("zero", "x", "y", state="waiting", reason="a job is running", summary=None)
    play(stage, waiting, study_card("base", *THREE))
    select = stage.page.locator("#study select")
    expect(select).to_have_value("base")  # there is something to see
    select.select_option("zero")
    expect(stage.page.locator("#study [role=status]")).to_have_text("a job is running")
    expect(stage.page.locator("#fine_tunes")).to_be_hidden()
    select.select_option("base")
    expect(stage.page.locator("#fine_tunes")).to_be_visible()


def test_names_and_reasons_are_text(stage: Stage) -> None:
    summary = summary_of(HOSTILE, HOSTILE, "b", "c")
    summary["diagnostics"][0]["reason"] = HOSTILE
    play(stage, study_card(HOSTILE, HOSTILE, "b", "c", summary=summary, reason=HOSTILE))
    expect(stage.page.locator(".findings li").first).to_contain_text(f"{HOSTILE}: {HOSTILE}")
    expect(stage.page.locator("#fine_tunes .plot svg").first).to_be_attached()
    assert stage.page.locator("section img, section tspan[style]").count() == 0


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "390"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_analysis_is_usable_by_everybody(
    showroom: LiveServer, visitor: Visitor, scheme: Literal["light", "dark"], size: ViewportSize
) -> None:
    names = [f"organisation/a-rather-long-name-of-model-{place}" for place in range(12)]
    cards = [study_card("base", *names), study_card("other", *THREE)]
    page = visitor.open(showroom, size=size, scheme=scheme).page
    answer_studies(page, *cards)
    go_to(page, "Analysis")
    expect(page.get_by_role("img", name="Cosines between 12 fine-tunes")).to_be_visible()
    open_tables(page)
    visitor.inspect(page, f"view-analysis-{size['width']}-{scheme}")


def test_refused_studies_are_told_of(showroom: LiveServer, visitor: Visitor) -> None:
    page, watch = visitor.open(showroom)
    fault = {"error": {"code": "not_ready", "message": "The registry is busy.", "param": None}}
    page.route("**/analysis", lambda route: route.fulfill(status=503, json=fault))
    watch.forgive("/analysis", 503)
    go_to(page, "Analysis")
    expect(page.get_by_role("alert").filter(visible=True)).to_have_text("The registry is busy.")


def test_without_the_chart_library_tables_are_opened(browser: Browser) -> None:
    with staged(browser, missing=frozenset({CHARTS})) as stage:
        play(stage, study_card("base", *THREE))
        expect(stage.page.get_by_role("status").get_by_text("could not be loaded")).to_have_count(4)
        expect(stage.page.locator("#direction tbody tr").first).to_be_visible()


def test_study_that_is_news_is_drawn(stage: Stage) -> None:
    play(stage, study_card("base", *THREE, state="running", summary=None))
    expect(stage.page.locator("#fine_tunes")).to_be_hidden()
    put = "store.studies.set(study.family, study)"
    stage.call("store", f"(({{store}}) => {put})(m)", study=study_card("base", *THREE))
    stage.page.evaluate(_NOW)
    expect(stage.page.locator("#fine_tunes")).to_be_visible()
    expect(stage.page.locator("#study .chip").first).to_have_text("done")
