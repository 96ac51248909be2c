"""Answers that follow a grammar, through an engine with real tokenizers."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from linker_core.config import EngineConfig
from linker_core.engine.grammar_builds import compile_grammar
from linker_core.engine.grammar_tokenizers import GrammarTokenizers
from linker_core.engine.messages import (
    Abort,
    FinishReason,
    ModelLoaded,
    SamplingParams,
    UnloadModel,
)
from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.engine.driving import GREEDY, SMALL, Driver, load_message
from tests.linker_core.engine.sampling.rows import sequence
from tests.linker_core.engine.serving import PROMPT, Served, serve_three

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "even": {"type": "boolean"},
        "digits": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "even", "digits"],
    "additionalProperties": False,
}
END = 2  # of every model here


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def json_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def constrained(grammar: str, **params: Any) -> SamplingParams:
    given: dict[str, Any] = {"max_tokens": 100, "stop_token_ids": frozenset({END}), **params}
    return SamplingParams(grammar=grammar, **given)


def text(served: Served, model: str, tokens: list[int]) -> str:
    return Tokenizer.load(served.paths[model]).decode(tokens)


def error(driver: Driver, request_id: str) -> tuple[str | None, str | None]:
    driver.run()
    found = driver.errors[request_id]
    return found["code"], found["param"]


def test_answers_follow_their_own_grammars_in_one_batch(served: Served) -> None:
    patterns = {"base": "[ab]{3}c", "own": "(yes|no)!", "half": "x+y{2,4}"}
    asked = [
        (
            model,
            pattern,
            served.driver.submit(model, PROMPT, constrained(regex(pattern), seed=seed)),
        )
        for model, pattern in patterns.items()
        for seed in range(4)
    ]
    free = served.driver.submit("own", PROMPT)
    served.driver.run()
    for model, pattern, request_id in asked:
        tokens = served.driver.tokens(request_id)
        assert served.driver.reason(request_id) is FinishReason.STOP
        assert tokens[-1] == END
        assert re.fullmatch(pattern, text(served, model, tokens))
    assert served.driver.tokens(free) == served.driver.generate("own", PROMPT)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_in_a_json_schema_are_valid_json(served: Served, temperature: float) -> None:
    params = constrained(json_schema(SCHEMA), temperature=temperature, max_tokens=200)
    ids = {
        seed: served.driver.submit("own", PROMPT, replace(params, seed=seed)) for seed in range(3)
    }
    served.driver.run()
    for request_id in ids.values():
        answer = json.loads(text(served, "own", served.driver.tokens(request_id)))
        assert set(answer) == {"name", "even", "digits"}
        assert isinstance(answer["even"], bool)
        assert len(answer["name"]) <= 6
        assert set(answer["digits"]) <= {1, 2, 3}


def test_answers_with_a_grammar_are_the_same_alone_and_among_others(served: Served) -> None:
    params = constrained(json_schema(SCHEMA), seed=5)
    alone = served.driver.generate("own", PROMPT, params)
    others = [served.driver.submit("half", PROMPT, replace(params, seed=n)) for n in range(4)]
    again = served.driver.submit("own", PROMPT, params)
    served.driver.run()
    assert served.driver.tokens(again) == alone
    assert not served.driver.errors
    assert len(others) == 4


def test_answers_with_a_grammar_survive_preemption(tmp_path: Path) -> None:
    # Matchers come one by one, from a thread: long answers meet however late they are.
    served = serve_three(tmp_path, "qwen2", replace(SMALL, kv_cache_tokens=180))
    params = constrained(regex("[a-z]{120}"), max_tokens=122)
    ids = [served.driver.submit("own", PROMPT, replace(params, seed=seed)) for seed in range(4)]
    served.driver.run()
    assert served.driver.engine.residents.families["base"].scheduler.num_preemptions > 0
    for seed, request_id in enumerate(ids):
        tokens = served.driver.tokens(request_id)
        assert re.fullmatch("[a-z]{120}", text(served, "own", tokens))
        assert served.driver.generate("own", PROMPT, replace(params, seed=seed)) == tokens


def test_the_end_comes_when_the_grammar_is_complete_and_not_before(served: Served) -> None:
    eager = constrained(regex("ab?"), logit_bias={END: 100.0}, temperature=0.0)
    assert text(served, "base", served.driver.generate("base", PROMPT, eager)) == "a"
    # Nothing can follow: the end comes although it is ignored, and too early for min_tokens.
    ignored = replace(eager, stop_token_ids=frozenset(), grammar=regex("ab"))
    for params in (ignored, replace(ignored, stop_token_ids=frozenset({END}), min_tokens=50)):
        request_id = served.driver.submit("base", PROMPT, params)
        served.driver.run()
        assert served.driver.tokens(request_id)[-1] == END
        assert served.driver.reason(request_id) is FinishReason.STOP
        assert text(served, "base", served.driver.tokens(request_id)) == "ab"


def test_an_ignored_end_does_not_end_what_can_go_on(served: Served) -> None:
    params = constrained(regex("a+"), stop_token_ids=frozenset(), logit_bias={END: 100.0})
    request_id = served.driver.submit("base", PROMPT, replace(params, max_tokens=9))
    served.driver.run()
    assert served.driver.reason(request_id) is FinishReason.LENGTH
    assert set(text(served, "base", served.driver.tokens(request_id))) == {"a"}


@pytest.mark.parametrize(
    "grammar", ["garbage {", regex("(a"), '{"grammars": [{}]}', "", "start: " + "(" * 9000]
)
def test_a_grammar_that_is_none_fails_its_request_alone(served: Served, grammar: str) -> None:
    bad = served.driver.submit("base", PROMPT, constrained(grammar))
    good = served.driver.submit("base", PROMPT)
    assert error(served.driver, bad) == ("invalid_request_error", "structured_outputs")
    assert len(served.driver.tokens(good)) == GREEDY.max_tokens
    assert not served.driver.tokens(bad)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("((", "unclosed group"), ("a" * 300 + "(", "unclosed group"), ("a\n(", "unclosed group"),
        ("[z-a]", "invalid character class range"), ("(?=a)b", "look-around"),
    ],
)  # fmt: skip
def test_regular_expression_that_is_none_is_told_why(
    served: Served, pattern: str, said: str
) -> None:
    bad = served.driver.submit("base", PROMPT, constrained(regex(pattern)))
    served.driver.run()
    message = served.driver.errors[bad]["message"]
    assert message is not None
    assert said in message
    assert len(message) < 300


def test_a_dead_end_fails_its_request_alone(served: Served) -> None:
    forbidden = frozenset(range(3, 60))
    bad = served.driver.submit(
        "base", PROMPT, constrained(regex("[ab]{9}"), allowed_token_ids=forbidden)
    )
    good = served.driver.submit("base", PROMPT)
    assert error(served.driver, bad) == ("invalid_request_error", "structured_outputs")
    assert len(served.driver.tokens(good)) == GREEDY.max_tokens


def test_a_grammar_that_grows_too_complex_fails_its_request_alone(served: Served) -> None:
    # So many keys begin alike that the parser would have to follow more of them than it may.
    keys = {f"p{n}": {"type": "string", "pattern": "^(a|b)*c{1,50}$"} for n in range(700)}
    many = json_schema({"type": "object", "properties": keys})
    bad = served.driver.submit("base", PROMPT, constrained(many))
    good = served.driver.submit("base", PROMPT, constrained(regex("abc")))
    assert error(served.driver, bad) == ("invalid_request_error", "structured_outputs")
    assert "2000" in (served.driver.errors[bad]["message"] or "")
    assert text(served, "base", served.driver.tokens(good)) == "abc"


@pytest.mark.parametrize("num_patterns", [24, 200])
def test_a_grammar_that_takes_endless_to_compile_fails_its_request_alone(
    served: Served, num_patterns: int
) -> None:
    # Nothing that llguidance can be told bounds this; it grows by 30 MB a second.
    patterns = [{"pattern": f"^.*[ab].{{{n}}}c.*$"} for n in range(10, 10 + num_patterns)]
    endless = json_schema({"type": "string", "allOf": patterns})
    bad = [served.driver.submit("base", PROMPT, constrained(endless)) for _ in range(3)]
    good = served.driver.submit("base", PROMPT, constrained(regex("abc")))
    for request_id in bad:
        assert error(served.driver, request_id) == ("invalid_request_error", "structured_outputs")
        assert "too much memory" in (served.driver.errors[request_id]["message"] or "")
    assert text(served, "base", served.driver.tokens(good)) == "abc"


def test_matcher_refuses_a_token_that_its_grammar_does_not_allow(served: Served) -> None:
    tokenizer = GrammarTokenizers().get(0, "base", served.paths["base"])
    state = sequence(vocab_size=512, grammar=regex("ab"))
    matcher = compile_grammar(state, tokenizer)
    (a,) = Tokenizer.load(served.paths["base"]).encode("a", add_special_tokens=False)
    assert not matcher.take(a)
    with pytest.raises(InvalidRequestError):
        matcher.take(a)


def test_a_grammar_beyond_the_limit_is_refused_before_it_is_compiled(served: Served) -> None:
    grammar = regex("a" * (64 << 10))
    request_id = served.driver.submit("base", PROMPT, constrained(grammar))
    assert error(served.driver, request_id) == ("invalid_request_error", "structured_outputs")
    assert served.driver.engine._grammars._ends.cache_info().misses == 0


def test_an_end_token_beyond_the_tokenizer_does_not_matter(served: Served) -> None:
    generation = json.dumps({"eos_token_id": [END, 100_000]})
    (served.paths["half"] / "generation_config.json").write_text(generation)
    tokens = served.driver.generate("half", PROMPT, constrained(regex("abc")))
    assert tokens[-1] == END
    assert text(served, "half", tokens) == "abc"


@pytest.mark.parametrize("content", ["{}", "/etc/hostname", "[]", ""])
def test_a_model_without_a_usable_tokenizer_refuses_grammars_alone(
    served: Served, content: str
) -> None:
    (served.paths["half"] / "tokenizer.json").write_text(content)
    bad = served.driver.submit("half", PROMPT, constrained(regex("a")))
    plain = served.driver.submit("half", PROMPT)
    assert error(served.driver, bad) == ("invalid_request_error", "structured_outputs")
    assert len(served.driver.tokens(plain)) == GREEDY.max_tokens


def test_what_is_kept_of_an_unusable_tokenizer_does_not_grow(served: Served) -> None:
    (served.paths["half"] / "tokenizer.json").write_text("{}")
    tokenizers = GrammarTokenizers()
    depths = []
    for _ in range(3):
        with pytest.raises(InvalidRequestError) as caught:
            tokenizers.get(0, "half", served.paths["half"])
        depths.append(len(caught.traceback))  # each of its frames holds on to a request
    assert depths == depths[:1] * 3


def test_a_sequence_that_waits_for_its_grammar_can_be_aborted(served: Served) -> None:
    engine = served.driver.engine
    request_id = served.driver.submit("base", PROMPT, constrained(regex("a+")))
    assert engine._grammars.num_pending == 1
    engine.handle(Abort(request_id=request_id))
    served.driver.run()
    assert not served.driver.outputs[request_id]
    assert not served.driver.errors
    assert engine._grammars.num_pending == 0


def test_snapshots_count_a_sequence_that_waits_for_its_grammar(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = served.driver.engine
    monkeypatch.setattr(engine._grammars, "finished", lambda _timeout_s: [])
    served.driver.submit("half", PROMPT, constrained(regex("a+")))
    engine._take_snapshot()
    served.driver.step()
    load = served.driver.snapshot().load
    assert (load["half"].running, load["half"].waiting) == (0, 1)
    assert (load["base"].running, load["base"].waiting) == (0, 0)


def test_models_with_the_same_tokenizer_share_what_is_prepared_while_one_is_there(
    served: Served,
) -> None:
    driver, engine = served.driver, served.driver.engine
    for model in ("base", "half", "own"):
        params = constrained(regex("a{3}"))
        assert text(served, model, driver.generate(model, PROMPT, params)) == "aaa"
    slots = {name: resident.slot for name, resident in engine.residents.served.items()}
    kept = engine._grammars._tokenizers._by_slot
    inner = {name: kept[slot].tokenizer.inner for name, slot in slots.items()}  # type: ignore[union-attr]
    assert inner["base"] is inner["half"]
    assert inner["base"] is not inner["own"]  # which has two tokens more

    request_id = driver.submit("own", PROMPT, constrained(regex("b{3}")))
    engine.handle(UnloadModel(model="own"))  # waits for the sequence, grammar and all
    driver.run()
    assert text(served, "own", driver.tokens(request_id)) == "bbb"
    assert "own" not in engine.residents.served
    assert text(served, "half", driver.generate("half", PROMPT, constrained(regex("c")))) == "c"
    assert slots["own"] not in kept  # the thread has come past


def test_end_tokens_are_each_models_own_under_one_tokenizer(served: Served) -> None:
    other = 300
    (served.paths["half"] / "generation_config.json").write_text(
        json.dumps({"eos_token_id": other})
    )
    record = json.loads((served.paths["half"] / "config.json").read_text())
    del record["eos_token_id"]
    driver = served.driver
    path = served.paths["half"].with_name("other")
    shutil.copytree(served.paths["half"], path)
    (path / "config.json").write_text(json.dumps(record))
    assert isinstance(driver.load(load_message("other", path, donor="base")), ModelLoaded)
    params = constrained(
        regex("ab*"), logit_bias={other: 50.0, END: 40.0}, stop_token_ids=frozenset()
    )
    for model, end in (("base", END), ("other", other)):
        # Ignored, the end of neither can come while the answer can go on.
        free = driver.generate(model, PROMPT, replace(params, max_tokens=5))
        assert not {END, other} & set(free)
        ended = replace(params, stop_token_ids=frozenset({end}))
        assert driver.generate(model, PROMPT, ended)[-1] == end


@pytest.mark.shared
def test_a_trained_model_with_its_own_tokenizer_answers_in_json(shared: Path) -> None:
    folder = shared / "families" / "mini-qwen2"
    driver = Driver(EngineConfig(kv_cache_tokens=2048, max_batch_tokens=64))
    for name in ("base", "chat"):
        donor = None if name == "base" else "base"
        assert isinstance(driver.load(load_message(name, folder / name, donor=donor)), ModelLoaded)
    with Checkpoint.open(folder / "chat") as checkpoint:
        end_ids = checkpoint.eos_token_ids
    tokenizer = Tokenizer.load(folder / "chat")
    prompt = tokenizer.encode("Name two fruits as JSON: ", add_special_tokens=False)
    params = constrained(json_schema(SCHEMA), stop_token_ids=end_ids, max_tokens=200)
    ids = [driver.submit("chat", prompt, replace(params, seed=seed)) for seed in range(3)]
    driver.run()
    for request_id in ids:
        assert driver.reason(request_id) is FinishReason.STOP
        answer = json.loads(tokenizer.decode(driver.tokens(request_id)))
        assert set(answer) == {"name", "even", "digits"}
