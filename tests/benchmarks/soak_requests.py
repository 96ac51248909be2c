"""What a soak sends: random requests, those with one right answer among them, and bad ones."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

Json = dict[str, Any]

_CONTEXT = 256
_MAX_PROMPT = 160
_MAX_ANSWER = 48
_NUM_PREFIXES = 6
_WORDS = ("the", "a", "cat", "sat", "on", "under", "tree", "river", "and", "then", "ran", "again")
_STRUCTURES: tuple[Json, ...] = (
    {"structured_outputs": {"regex": "[a-f]{4,12}-[0-9]{2,6}"}},
    {"structured_outputs": {"choice": ["yes", "no", "perhaps later"]}},
    {"structured_outputs": {"grammar": 'start: "<" /[a-z]{1,9}/ ("," /[a-z]{1,9}/){0,4} ">"'}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": {
        "type": "object", "required": ["x", "tag"], "additionalProperties": False,
        "properties": {"x": {"type": "integer"}, "tag": {"type": "string", "maxLength": 8}},
    }}}},
)  # fmt: skip
BAD: tuple[Json, ...] = (
    {"temperature": -1}, {"n": 0}, {"n": 9}, {"prompt": []}, {"prompt": [10**6]}, {"prompt": ""},
    {"max_tokens": 10**6}, {"logit_bias": {"999999": 1}}, {"allowed_token_ids": []},
    {"allowed_token_ids": [10**6]}, {"cache_salt": "a\nb"}, {"priority": 2**40},
    {"structured_outputs": {"regex": "(a"}}, {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"json": {"type": "strin"}}}, {"model": "nobody"}, {"stop": [""]},
    {"min_tokens": 9, "max_tokens": 3}, {"prompt_logprobs": 99},
    {"suffix": "x"},
)  # fmt: skip


class Ending(Enum):
    """How the client takes an answer."""

    WHOLE = "whole"
    STREAM = "stream"
    LEAVE_STREAM = "leave stream"  # after some pieces
    LEAVE_WAITING = "leave waiting"  # before the answer is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request."""

    path: str
    body: Json
    ending: Ending = Ending.WHOLE
    patience: float = 0.0  # of those who leave: pieces, or seconds
    is_repeatable: bool = False  # greedy or seeded: there is one right answer

    @property
    def key(self) -> str:
        """What the right answer depends on."""
        return self.path + json.dumps(self.body, sort_keys=True)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the likeliest."""
        return self.body.get("temperature") == 0


class Asks:
    """An endless supply.

    Args:
        models: Names.
        seed: Of everything random.
        num_repeatable: How many different requests with one right answer there are.
    """

    def __init__(self, models: Sequence[str], *, seed: int, num_repeatable: int) -> None:
        self._random = random.Random(seed)
        self._models = list(models)
        self._prefixes = [self._ids(self._random.randrange(16, 96)) for _ in range(_NUM_PREFIXES)]
        self._repeatable = [self._make(is_repeatable=True) for _ in range(num_repeatable)]

    def next(self) -> Ask:
        """Returns a good request, and how it is to be taken."""
        rng = self._random
        ask = rng.choice(self._repeatable) if rng.random() < 0.8 else self._make()
        # None of these changes an answer.
        more: Json = {}
        if rng.random() < 0.1:  # few: the others wait for as long as there are such
            more["priority"] = rng.choice((-2, -1))
        if rng.random() < 0.5:
            more["cache_salt"] = rng.choice(("red", "green"))
        ending = rng.choices(tuple(Ending), weights=(4, 4, 2, 1))[0]
        patience = rng.random() * 0.3 if ending is Ending.LEAVE_WAITING else rng.randrange(1, 20)
        return replace(ask, body=ask.body | more, ending=ending, patience=patience)

    def bad(self) -> Ask:
        """Returns a request that is to be refused."""
        rng = self._random
        good = {"model": rng.choice(self._models), "prompt": self._ids(4), "max_tokens": 4}
        return Ask(path="/v1/completions", body=good | rng.choice(BAD))

    def is_bad_next(self) -> bool:
        """Says whether it is time for one."""
        return self._random.random() < 0.05

    def _make(self, *, is_repeatable: bool = False) -> Ask:
        rng = self._random
        body: Json = {
            "model": rng.choice(self._models),
            "max_tokens": rng.randrange(1, _MAX_ANSWER),
            "return_token_ids": True,
            "ignore_eos": rng.random() < 0.7,
        }
        if is_repeatable and rng.random() < 0.6:
            body["temperature"] = 0
        else:
            body |= {"temperature": rng.choice((0.5, 1.0, 1.5)), "top_p": rng.choice((1.0, 0.9))}
            if is_repeatable:
                body["seed"] = rng.randrange(1000)
        if rng.random() < 0.2:
            body["n"] = rng.randrange(2, 5)
        self._decorate(body)
        is_chat = rng.random() < 0.3
        body |= self._dialogue() if is_chat else self._prompt()
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        return Ask(path=path, body=body, is_repeatable=is_repeatable)

    def _decorate(self, body: Json) -> None:
        rng = self._random
        if rng.random() < 0.15:
            body |= rng.choice(_STRUCTURES) | {"max_tokens": _MAX_ANSWER, "ignore_eos": False}
        elif rng.random() < 0.2:
            body |= rng.choice(
                ({"stop": ["e", "qu"]}, {"bad_words": ["a", "the"]}, {"min_tokens": 1},
                 {"repetition_penalty": 1.2}, {"allowed_token_ids": self._ids(12)}),
            )  # fmt: skip

    def _dialogue(self) -> Json:
        text = " ".join(self._random.choices(_WORDS, k=self._random.randrange(1, 24)))
        return {"messages": [{"role": "user", "content": text}], "logprobs": True}

    def _prompt(self) -> Json:
        rng = self._random
        prefix = rng.choice(self._prefixes) if rng.random() < 0.6 else []
        own = self._ids(rng.randrange(1, _MAX_PROMPT - len(prefix)))
        return {"prompt": prefix + own, "logprobs": rng.randrange(3), "echo": rng.random() < 0.2}

    def _ids(self, number: int) -> list[int]:
        return [self._random.randrange(3, 512) for _ in range(number)]
