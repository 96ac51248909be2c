"""Cached prefixes change what is computed, and nothing of what is answered."""

from __future__ import annotations

from dataclasses import replace

from linker_core.engine.messages import ModelUnloaded, Snapshot, Submit, UnloadModel
from linker_core.engine.snapshot import take_snapshot
from tests.linker_core.engine.driving import GREEDY, Driver, load_message
from tests.linker_core.engine.families import reference_greedy
from tests.linker_core.engine.serving import PROMPT, Served

LONG = [*PROMPT, *PROMPT, *PROMPT]  # 21 tokens: five full pages of four
WITH_LOGPROBS = replace(GREEDY, logprobs=2)


def submit(
    driver: Driver, request_id: str, *, model: str = "own", salt: str = "", priority: int = 0
) -> str:
    driver.engine.handle(
        Submit(
            request_id=request_id,
            model=model,
            prompt_ids=tuple(LONG),
            sampling=WITH_LOGPROBS,
            cache_salt=salt,
            priority=priority,
        )
    )
    return request_id


def snapshot(driver: Driver) -> Snapshot:
    return take_snapshot(driver.engine.residents, (), driver.engine.device)


def num_cached(driver: Driver, request_id: str) -> int | None:
    return driver.outputs[request_id][0].num_cached_tokens


def test_answer_over_cached_pages_is_that_over_computed_ones(served: Served) -> None:
    driver = served.driver
    first = submit(driver, "first")
    driver.run()
    again = submit(driver, "again")
    driver.run()
    assert (num_cached(driver, first), num_cached(driver, again)) == (0, 20)
    want = reference_greedy(served.references["own"], LONG, GREEDY.max_tokens)
    assert driver.tokens(first) == driver.tokens(again) == want
    report = snapshot(driver)
    assert (report.prefix_queries, report.prefix_hits) == (42, 20)
    assert report.kv_usage_ratio == 0.0


def test_choices_of_one_prompt_compute_it_once(served: Served) -> None:
    driver = served.driver
    choices = [submit(driver, f"choice {number}") for number in range(4)]
    driver.run()
    assert [num_cached(driver, choice) for choice in choices] == [0, 20, 20, 20]
    want = reference_greedy(served.references["own"], LONG, GREEDY.max_tokens)
    assert [driver.tokens(choice) for choice in choices] == [want] * 4


def test_other_variants_and_tenants_find_nothing(served: Served) -> None:
    driver = served.driver
    submit(driver, "first", salt="a tenant")
    driver.run()
    strangers = [
        submit(driver, "variant", model="half", salt="a tenant"),
        submit(driver, "tenant", salt="another"),
        submit(driver, "nobody"),
    ]
    driver.run()
    assert [num_cached(driver, stranger) for stranger in strangers] == [0, 0, 0]
    want = reference_greedy(served.references["half"], LONG, GREEDY.max_tokens)
    assert driver.tokens("variant") == want


def test_model_that_comes_back_finds_nothing_of_before(served: Served) -> None:
    driver = served.driver
    submit(driver, "before")
    driver.run()
    driver.engine.handle(UnloadModel(model="own"))
    driver.run()
    assert ModelUnloaded(model="own") in driver.events
    driver.load(load_message("own", served.paths["own"], donor="base"))
    submit(driver, "after")
    driver.run()
    assert num_cached(driver, "after") == 0
    assert driver.tokens("after") == driver.tokens("before")


def test_totals_outlive_the_family_that_counted_them(served: Served) -> None:
    driver = served.driver
    for request_id in ("first", "again"):
        submit(driver, request_id)
        driver.run()
    for model in ("own", "half", "base"):
        driver.engine.handle(UnloadModel(model=model))
        driver.run()
    report = snapshot(driver)
    assert report.models == {}
    assert (report.prefix_queries, report.prefix_hits) == (42, 20)


def test_what_pages_held_before_is_never_read(served: Served) -> None:
    cache = served.driver.engine.residents.families["base"].cache
    for stored in (cache.keys_LNKDP, cache.values_LNKPD):
        stored.fill_(float("nan"))
    answers = {model: submit(served.driver, model, model=model) for model in served.references}
    served.driver.run()
    for model, request_id in answers.items():
        want = reference_greedy(served.references[model], LONG, GREEDY.max_tokens)
        assert served.driver.tokens(request_id) == want
