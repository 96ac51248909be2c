from __future__ import annotations

from linker_core.engine.messages import PromptLogprob
from server.gateway.logprobs import CompletionLogprobs, ScoredToken, prompt_logprobs
from tests.server.live import LiveServer


def test_broken_bytes_that_read_the_same_keep_the_likelier(server: LiveServer) -> None:
    tokenizer = server.served("base").text.tokenizer
    broken = [i for i in range(512) if tokenizer.token_text(i) == "\ufffd"]
    assert len(broken) > 1
    token = ScoredToken(broken[0], -3.0, ((broken[1], -0.5), (70, -1.0)))
    record = CompletionLogprobs(tokenizer, num_top=2).take([token])
    assert record["token_logprobs"] == [-3.0]
    assert record["top_logprobs"] == [{"\ufffd": -0.5, tokenizer.token_text(70): -1.0}]


def test_impossible_tokens_have_a_number_that_json_knows(server: LiveServer) -> None:
    tokenizer = server.served("base").text.tokenizer
    never = float("-inf")
    token = ScoredToken(70, never, ((71, 0.0),))
    record = CompletionLogprobs(tokenizer, num_top=1).take([token])
    assert record["token_logprobs"] == [-9999.0]
    prompt = PromptLogprob(token_id=70, logprob=never, rank=9, top_logprobs=((71, 0.0),))
    entry = prompt_logprobs([prompt], tokenizer, num_top=1)[1]
    assert entry is not None
    assert entry["70"]["logprob"] == -9999.0


def test_own_token_among_the_alternatives_stands_once_and_first(server: LiveServer) -> None:
    tokenizer = server.served("base").text.tokenizer
    top = ((71, -0.5), (70, -1.0))
    prompt = PromptLogprob(token_id=70, logprob=-1.0, rank=2, top_logprobs=top)
    entry = prompt_logprobs([prompt], tokenizer, num_top=2)[1]
    assert entry is not None
    assert [(key, value["rank"]) for key, value in entry.items()] == [("70", 2), ("71", 1)]
