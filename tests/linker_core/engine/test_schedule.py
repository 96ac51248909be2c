from __future__ import annotations

from linker_core.engine.messages import SamplingParams
from linker_core.engine.schedule import Budget, Scheduled
from tests.linker_core.engine.scheduling import make_sequence

SCORED = SamplingParams(max_tokens=2, prompt_logprobs=1)


def test_num_logits_is_one_for_the_last_chunk_and_all_where_the_prompt_is_scored() -> None:
    plain, scored = make_sequence(range(8)), make_sequence(range(8), sampling=SCORED)
    assert [Scheduled(plain, n).num_logits for n in (1, 7, 8)] == [0, 0, 1]
    assert [Scheduled(scored, n).num_logits for n in (1, 7, 8)] == [1, 7, 8]
    scored.tokens.append(3)  # recomputed after its first token, nobody needs them again
    assert [Scheduled(scored, n).num_logits for n in (1, 8, 9)] == [0, 0, 1]


def test_take_leaves_the_last_token_where_no_row_of_logits_is_left() -> None:
    budget = Budget(num_rows=20, num_logits=3)
    plain, scored = make_sequence(range(8)), make_sequence(range(8), sampling=SCORED)
    assert budget.take(scored) == 3
    assert budget.take(plain) == 7
    assert (budget.num_rows, budget.num_logits) == (10, 0)
    assert budget.take(make_sequence(sampling=SCORED)) == 0
    assert budget.chunks([plain, scored]) == [Scheduled(plain, 7), Scheduled(scored, 3)]


def test_withdraw_gives_rows_and_logits_back_even_of_one_that_was_reset() -> None:
    budget = Budget(num_rows=6, num_logits=2)
    sequence, decode = make_sequence(range(8)), make_sequence()
    sequence.num_computed = 5
    budget.take_one_each([decode])
    assert budget.take(sequence) == 3
    assert (budget.num_rows, budget.num_logits) == (2, 0)
    sequence.num_computed = 0
    assert budget.withdraw(sequence) == 3
    assert budget.withdraw(sequence) == 0
    assert (budget.num_rows, budget.num_logits) == (5, 1)
    assert budget.chunks([sequence, decode]) == [Scheduled(decode, 1)]
