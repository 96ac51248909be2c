from __future__ import annotations

import json
from typing import Any

from linker_core.engine.messages import PromptLogprob, TokenOutput
from server.gateway.generation import Delta
from server.gateway.shared_prompts import SharedPrompts
from tests.server.live import LiveServer

RECORD = (PromptLogprob(token_id=1, logprob=-1.0, rank=1, top_logprobs=()),)


def piece(index: int, *, record: tuple[PromptLogprob, ...] | None = None) -> Delta:
    token = TokenOutput(request_id="r", token_id=5, prompt_logprobs=record)
    return Delta(index=index, token=token, text="", finish_reason=None)


def test_others_wait_for_the_record_and_carry_it_once() -> None:
    shared = SharedPrompts(2)
    early = [piece(1), piece(1)]
    assert shared.take(early) == []
    first = piece(0, record=RECORD)
    assert shared.take([first]) == [first, piece(1, record=RECORD), piece(1)]
    for index in (0, 1):
        assert shared.take([piece(index)]) == [piece(index)]


def test_prompts_have_records_of_their_own() -> None:
    shared = SharedPrompts(2)
    shared.take([piece(0, record=())])
    assert shared.take([piece(3)]) == []
    assert shared.take([piece(1)]) == [piece(1, record=())]
    assert shared.take([piece(2, record=RECORD)])[1:] == [piece(3, record=RECORD)]


def test_all_choices_answer_as_if_each_had_asked(server: LiveServer) -> None:
    more: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 2}
    alone = server.complete("base", [67, 68], prompt_logprobs=1, **more).json()["choices"][0]
    for choice in server.complete("base", [67, 68], n=3, prompt_logprobs=1, **more).json()[
        "choices"
    ]:
        assert choice == alone | {"index": choice["index"]}
    events = server.complete("base", [67, 68], n=3, stream=True, **more).text.split("\n\n")
    chunks = [json.loads(line[6:])["choices"][0] for line in events if line.startswith("data: {")]
    for index in range(3):
        tokens = [t for c in chunks if c["index"] == index for t in c["logprobs"]["tokens"]]
        assert tokens == alone["logprobs"]["tokens"]
