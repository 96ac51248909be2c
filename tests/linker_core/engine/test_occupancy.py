"""Equal beginnings are computed once, and read by those alone who may."""

from __future__ import annotations

import pytest

from linker_core.engine.prefix import PageKeys
from linker_core.engine.sequence import SequenceState
from tests.linker_core.engine.scheduling import Simulation, answer, make_sequence

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]  # two pages and a half


def cost(model: Simulation, *sequences: SequenceState) -> int:
    """Tokens computed until all is done; every answer is looked at."""
    before = model.num_computed_tokens
    model.run()
    for sequence in sequences:
        assert sequence in model.finished
        assert sequence.tokens[sequence.num_prompt :] == answer(sequence)
    return model.num_computed_tokens - before


def test_same_prompt_again_computes_only_what_is_beyond_its_full_pages() -> None:
    model = Simulation()
    first = model.submit(PROMPT, max_tokens=1)
    assert cost(model, first) == 10
    again = model.submit(PROMPT, max_tokens=1)
    assert cost(model, again) == 2
    assert (first.num_cached, again.num_cached) == (0, 8)
    assert (model.scheduler.prefix_queries, model.scheduler.prefix_hits) == (20, 8)


def test_prompt_of_whole_pages_computes_its_last_one_for_the_logits() -> None:
    model = Simulation()
    assert cost(model, model.submit(PROMPT[:8], max_tokens=1)) == 8
    again = model.submit(PROMPT[:8], max_tokens=1)
    assert cost(model, again) == 4
    longer = model.submit(PROMPT[:9], max_tokens=1)
    assert cost(model, longer) == 1


def test_answers_are_cached_for_the_next_turn_of_a_dialogue() -> None:
    model = Simulation()
    first = model.submit(PROMPT, max_tokens=8)
    model.run()
    follow_up = model.submit([*first.tokens, 1, 2, 3], max_tokens=1)
    # The last token chosen was never computed: 17 are there, 16 of them in full pages.
    assert cost(model, follow_up) == 21 - 16


@pytest.mark.parametrize("other", [{"slot": 1}, {"salt": "another tenant"}])
def test_prompt_of_another_variant_or_tenant_is_computed_anew(other: dict[str, int | str]) -> None:
    model = Simulation()
    model.submit(PROMPT, max_tokens=1)
    model.run()
    stranger = model.submit(PROMPT, max_tokens=1, **other)  # type: ignore[arg-type]
    assert cost(model, stranger) == 10
    assert stranger.num_cached == 0


@pytest.mark.parametrize("rows", [4, 8, 64])
def test_prompts_that_arrive_together_are_computed_once(rows: int) -> None:
    model = Simulation(rows=rows, num_seqs=16)
    together = [model.submit(PROMPT, max_tokens=1) for _ in range(4)]
    longer = model.submit([*PROMPT, *range(20, 30)], max_tokens=1)
    assert cost(model, *together, longer) == 10 + 3 * 2 + (20 - 8)
    assert model.scheduler.prefix_hits == 4 * 8


def test_prompts_that_arrive_together_hold_their_common_pages_once() -> None:
    model = Simulation(rows=64, num_seqs=16)
    for _ in range(4):
        model.submit(PROMPT, max_tokens=20)
    for _ in range(3):
        model.step()
    assert len(model.scheduler.running) == 4
    assert model.cache.num_used_pages == 2 + 4


def test_others_go_past_whoever_waits_for_a_prefix() -> None:
    model = Simulation(rows=6, num_seqs=4)
    owner, held = model.submit(PROMPT), model.submit(PROMPT)
    other = model.submit(3)
    assert model.step() == {owner: 6}
    assert model.step() == {owner: 4, other: 2}
    assert held in model.scheduler.waiting
    assert model.step() == {owner: 1, other: 1, held: 2}


@pytest.mark.parametrize("end", ["abort", "fault", "preempt"])
def test_whoever_waits_for_a_prefix_goes_on_when_the_other_is_gone(end: str) -> None:
    model = Simulation(rows=5, num_seqs=1 if end == "preempt" else 4)
    owner, held = model.submit(PROMPT, priority=1), model.submit(PROMPT, priority=1)
    model.step()
    if end == "abort":
        model.scheduler.remove(owner)
    elif end == "fault":
        model.step(faulty=[owner])
        assert model.failed == [owner]
    else:
        model.submit(3, slot=1, priority=0, max_tokens=1)
        model.step()
        assert model.scheduler.num_preemptions == 1
    model.run()
    assert held in model.finished
    assert held.num_cached == 4 or end == "preempt"


def test_pages_of_a_faulty_step_are_read_by_nobody() -> None:
    model = Simulation(rows=5)
    bad = model.submit(PROMPT)
    model.step()
    model.step(faulty=[bad])
    assert model.failed == [bad]
    again = model.submit(PROMPT, max_tokens=1)
    assert cost(model, again) == 6
    assert again.num_cached == 4  # what was finite before


def test_prompt_whose_every_row_is_wanted_is_computed_whole_and_lent() -> None:
    model = Simulation(rows=16, num_seqs=16)
    assert cost(model, model.submit(PROMPT, max_tokens=1)) == 10
    scored = model.submit(PROMPT, max_tokens=1, prompt_logprobs=0)
    assert cost(model, scored) == 10
    assert scored.num_cached == 0
    assert model.scheduler.prefix_queries == 10  # nothing was looked up for it
    other = [n + 40 for n in PROMPT]
    both = [model.submit(other, max_tokens=1, prompt_logprobs=0), model.submit(other, max_tokens=1)]
    assert cost(model, *both) == 10 + 2


def test_preempted_sequences_find_their_own_pages_again() -> None:
    model = Simulation(num_pages=64, rows=32, num_seqs=2)
    sequences = [model.submit(PROMPT[n:], priority=1, max_tokens=20) for n in (0, 1)]
    for _ in range(10):
        model.step()
    urgent = model.submit(3, max_tokens=1)
    model.step()
    assert model.scheduler.num_preemptions == 1
    # 9 + 9 tokens were computed of the newer one, 16 of them in full pages; nothing was evicted.
    before = model.num_computed_tokens
    model.step()
    assert urgent in model.finished
    assert model.num_computed_tokens - before == 1 + (9 + 10 - 16)
    assert sequences[1].num_cached == 0
    cost(model, *sequences)


def test_cached_pages_are_used_only_as_long_as_nobody_needs_the_room() -> None:
    model = Simulation(num_pages=4)
    model.submit(PROMPT, max_tokens=1)
    model.run()
    assert model.cache.num_free_pages == 4
    crowd = model.submit([50] * 15, max_tokens=1)
    assert cost(model, crowd) == 15
    assert cost(model, model.submit(PROMPT, max_tokens=1)) == 10


def test_sequences_without_a_root_share_nothing() -> None:
    model = Simulation()
    for _ in range(2):
        sequence = make_sequence(PROMPT)
        sequence.page_keys = PageKeys(None)
        model.scheduler.add(sequence)
        while sequence not in model.finished:
            model.step()
        assert sequence.num_cached == 0
    assert model.cache.find(PageKeys(sequence.key_root).first(2, PROMPT, 4)) == []
