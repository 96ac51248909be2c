"""Scores of tasks against transformers' logits, choice by choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors

from linker_core.errors import InvalidRequestError
from linker_core.pace import Pace
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.scoring import TaskScorer, score_task
from linker_core.tuning.storages import Rungs
from linker_core.tuning.tasks import Choice, Example, Task
from tests import tiny
from tests.linker_core.engine.families import CPU, reference_logits
from tests.linker_core.tuning.pairs import Pair, make_pair

BOS, VOCAB = 0, 512


def example(
    context: str | Sequence[str], answers: Sequence[str], *, gold: int = 0, normed: bool = True
) -> Example:
    contexts = [context] * len(answers) if isinstance(context, str) else context
    return Example(
        choices=tuple(
            Choice(context=text, continuation=f" {answer}", num_chars=len(answer))
            for text, answer in zip(contexts, answers, strict=True)
        ),
        gold=gold,
        normed=normed,
    )


def task(*examples: Example, name: str = "made up") -> Task:
    return Task(name=name, examples=examples)


TASKS = (
    task(
        *(
            example(
                f"Number {n} is", [f"odd, not {n}", "even", f"a fish of {n * 7} kg"], gold=n % 3
            )
            for n in range(12)
        ),
        name="asked",
    ),
    task(
        *(
            example(
                [f"The {a} met them and the {option}" for option in (a, b)],
                [f"left early{'.' * n}"] * 2,
                gold=n % 2,
                normed=False,
            )
            for n, (a, b) in enumerate([("owl", "fox"), ("cat", "bee"), ("ant", "elk")] * 3)
        ),
        name="filled in",
    ),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("scoring"), scale=0.4)


def scorer(
    pair: Pair, tasks: Sequence[Task] = TASKS, tokenizer: Tokenizer | None = None
) -> TaskScorer:
    return TaskScorer(
        pair.variant.config,
        tokenizer or Tokenizer.load(pair.variant.path),
        pair.reader(),
        tasks,
        device=CPU,
        pace=Pace(),
        precision="highest",
    )


def direct(pair: Pair, rungs: Rungs, tasks: Sequence[Task]) -> list[float]:
    """Log-likelihoods of every choice from transformers' logits in float64."""
    model = pair.oracle(rungs)
    tokenizer = Tokenizer.load(pair.variant.path)
    found = []
    for one in (c for t in tasks for e in t.examples for c in e.choices):
        ids = tokenizer.encode(one.context + one.continuation, add_special_tokens=False)
        start = len(tokenizer.encode(one.context, add_special_tokens=False))
        assert tokenizer.decode(ids[start:]) == one.continuation
        log_probs = torch.log_softmax(reference_logits(model, ids).double(), dim=-1)
        found.append(sum(float(log_probs[p - 1, ids[p]]) for p in range(start, len(ids))))
    return found


def best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def test_likelihoods_and_scores_equal_a_direct_computation(pair: Pair) -> None:
    plans = [pair.base, pair.aliasing("layers.0."), pair.aliasing("layers.")]
    asker = scorer(pair)
    likelihoods, scores = asker.likelihoods(plans), asker.score(plans)
    asked, filled = TASKS
    for plan, found, by_task in zip(plans, likelihoods, scores, strict=True):
        want = direct(pair, plan, TASKS)
        assert found == pytest.approx(want, rel=1e-4)
        first, rest = want[:36], want[36:]
        plain = normed = hits = 0
        for number, one in enumerate(asked.examples):
            values = first[3 * number : 3 * number + 3]
            plain += best(values) == one.gold
            pairs = zip(values, one.choices, strict=True)
            normed += best([value / choice.num_chars for value, choice in pairs]) == one.gold
        for number, one in enumerate(filled.examples):
            hits += best(rest[2 * number : 2 * number + 2]) == one.gold
        assert by_task["asked"].acc == plain / 12
        assert by_task["asked"].acc_norm == by_task["asked"].score == normed / 12
        assert by_task["filled in"].acc == by_task["filled in"].score == hits / 9
    assert np.abs(likelihoods[0] - likelihoods[2]).max() > 0.1  # so that plans matter


def test_equal_plans_and_common_beginnings_are_computed_once(pair: Pair) -> None:
    asker = scorer(pair)
    whole, part = pair.aliasing("layers."), pair.aliasing("layers.2.")
    first, again, other = asker.score([whole, dict(whole), part])
    assert first == again
    assert set(first) == set(other) == {"asked", "filled in"}
    # The donor's three blocks, the variant's first two, and the donor's third after those.
    assert asker.forward_passes == (3 + 3) / 3


def test_score_divides_by_characters_only_where_the_task_asks_for_it() -> None:
    answers = ["no", "a long answer"]
    likelihoods = np.array([-4.0, -6.5])  # per character: -2, -0.5
    score = score_task(task(example("Q", answers, gold=1)), likelihoods)
    assert (score.acc, score.acc_norm, score.score) == (0.0, 1.0, 1.0)
    score = score_task(task(example("Q", answers, gold=1, normed=False)), likelihoods)
    assert (score.acc, score.acc_norm, score.score) == (0.0, 1.0, 0.0)


def test_standard_error_is_that_of_independent_questions() -> None:
    one = [example("Q", ["a", "b"], gold=int(number == 0)) for number in range(5)]
    score = score_task(task(*one), np.array([-1.0, -2.0] * 5))
    assert score.score == 0.8
    assert score.stderr == pytest.approx((0.8 * 0.2 / 4) ** 0.5)


def test_spaces_at_a_context_s_end_belong_to_the_continuation(pair: Pair) -> None:
    def found(context: str, continuation: str) -> float:
        choice = Choice(context=context, continuation=continuation, num_chars=1)
        asked = Example(choices=(choice, choice), gold=0, normed=True)
        (likelihoods,) = scorer(pair, [task(asked)]).likelihoods([pair.base])
        return float(likelihoods[0])

    assert found("Two plus two is  ", "four") == found("Two plus two is", "  four")
    assert found("Two plus two is", "  four") != found("Two plus two is", " four")


def test_tokens_that_a_tokenizer_prescribes_come_first(pair: Pair) -> None:
    inner = tiny.byte_level_tokenizer(VOCAB)
    plain = Tokenizer(inner, bos_token=None, eos_token=None)
    ids = plain.encode("One two", add_special_tokens=False)
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", BOS)]
    )
    asked = task(example("One", ["two", "two"]))
    (likelihoods,) = scorer(pair, [asked], plain).likelihoods([pair.base])
    logits = reference_logits(pair.oracle(pair.base), [BOS, *ids]).double()
    log_probs = torch.log_softmax(logits, dim=-1)
    start = len(plain.encode("One", add_special_tokens=False))
    want = sum(float(log_probs[p, ids[p]]) for p in range(start, len(ids)))
    assert list(likelihoods) == pytest.approx([want, want], rel=1e-4)


def test_long_question_loses_its_beginning(pair: Pair) -> None:
    limit = pair.variant.config.max_position_embeddings
    assert limit == 256
    tokenizer = Tokenizer.load(pair.variant.path)
    asked = task(example("zq" * 300 + " is it", ["so", "not so"]))
    (likelihoods,) = scorer(pair, [asked]).likelihoods([pair.base])
    ids = tokenizer.encode("zq" * 300 + " is it so", add_special_tokens=False)
    assert len(ids) > limit
    cut = ids[-limit:]
    logits = reference_logits(pair.oracle(pair.base), cut).double()
    log_probs = torch.log_softmax(logits, dim=-1)
    length = len(tokenizer.encode(" so", add_special_tokens=False))
    want = sum(float(log_probs[p - 1, cut[p]]) for p in range(limit - length, limit))
    assert likelihoods[0] == pytest.approx(want, rel=1e-4)


def test_choice_that_leaves_no_room_for_its_question_is_refused(pair: Pair) -> None:
    with pytest.raises(InvalidRequestError, match="no tokens of its own") as caught:
        scorer(pair, [task(example("Is it", ["so", "zq" * 300]))])
    assert caught.value.param == "tasks"


def test_ids_beyond_the_model_are_refused(pair: Pair, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path, vocab_size=VOCAB, added_tokens=["<new>"])
    wider = Tokenizer.load(tmp_path)
    with pytest.raises(InvalidRequestError, match="beyond the model's last"):
        scorer(pair, [task(example("Is it", ["<new>", "old"]))], wider)
