"""Whatever else runs, is cached, preempted or aborted: every answer is the one given alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from linker_core.engine.messages import Abort, SamplingParams, Submit
from tests.linker_core.engine.driving import SMALL, Driver
from tests.linker_core.engine.serving import PROMPT, serve_three

MODELS = ("base", "own", "half")
Answer = list[tuple[int, float | None]]


def requests(seed: int) -> Iterator[Submit]:
    """Requests of all variants whose prompts begin alike now and then."""
    chance = random.Random(seed)
    for number in range(40):
        common = [*PROMPT, *PROMPT, *PROMPT][: chance.randrange(22)]
        own = [chance.randrange(512) for _ in range(chance.randrange(1, 12))]
        yield Submit(
            request_id=f"request {number}",
            model=chance.choice(MODELS),
            prompt_ids=(*common, *own),
            sampling=SamplingParams(
                max_tokens=chance.randrange(1, 16), temperature=0.0, logprobs=0
            ),
            priority=chance.choice((0, 0, 0, 1)),
            cache_salt=chance.choice(("", "a tenant")),
        )


def answer(driver: Driver, request_id: str) -> Answer:
    return [(token.token_id, token.logprob) for token in driver.outputs[request_id]]


def answers_alone(driver: Driver, traffic: list[Submit]) -> dict[str, Answer]:
    """Each computed by itself, nothing of it found in the cache."""
    for submit in traffic:
        driver.engine.handle(replace(submit, cache_salt=submit.request_id))
        driver.run()
    return {submit.request_id: answer(driver, submit.request_id) for submit in traffic}


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_answers_in_a_crowd_are_bit_for_bit_those_given_alone(
    tmp_path: Path, architecture: str
) -> None:
    traffic = list(requests(3))
    alone = answers_alone(serve_three(tmp_path / "alone", architecture).driver, traffic)
    # 24 pages of 4 tokens for up to 8 sequences of up to 48: many are preempted.
    crowded = replace(SMALL, kv_cache_tokens=96)
    driver = serve_three(tmp_path / "crowd", architecture, crowded).driver
    chance = random.Random(4)
    aborted = set()
    for submit in traffic:
        driver.engine.handle(submit)
        for _ in range(chance.randrange(3)):
            driver.step()
        if chance.random() < 0.1:
            aborted.add(submit.request_id)
            driver.engine.handle(Abort(request_id=submit.request_id))
    driver.run()
    for submit in traffic:
        got, want = answer(driver, submit.request_id), alone[submit.request_id]
        assert got == (want[: len(got)] if submit.request_id in aborted else want)
    scheduler = driver.engine.residents.families["base"].scheduler
    assert aborted
    assert scheduler.num_preemptions > 0
    assert scheduler.prefix_hits > 0
    assert scheduler.cache.num_used_pages == 0
