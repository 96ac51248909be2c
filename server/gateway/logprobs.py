"""Log-probabilities of tokens in the two shapes that OpenAI's routes have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

from linker_core.engine.messages import PromptLogprob, TokenOutput
from linker_core.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no minus infinity


def chat_logprobs(
    tokens: Sequence[TokenOutput], tokenizer: Tokenizer, *, num_top: int
) -> dict[str, Any]:
    """Returns `choices[].logprobs` of a chat answer, an entry per token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        return {
            "token": text,
            "logprob": max(logprob, _LOWEST),
            "bytes": list(text.encode("utf-8")),
        }

    content = [
        {
            **entry(token.token_id, _logprob(token)),
            "top_logprobs": [entry(*pair) for pair in token.top_logprobs[:num_top]],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    prompt: Iterable[PromptLogprob], tokenizer: Tokenizer, *, num_top: int
) -> list[dict[str, Any] | None]:
    """Returns `prompt_logprobs` as vLLM has it: an entry per token, null for the first.

    Args:
        prompt: All tokens but the first.
        tokenizer: The model's.
        num_top: Alternatives per token; the prompt's own token stands before them.
    """

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        return {"logprob": max(logprob, _LOWEST), "rank": rank, "decoded_token": text}

    entries: list[dict[str, Any] | None] = [None]
    for token in prompt:
        own = {str(token.token_id): entry(token.token_id, token.logprob, token.rank)}
        top = enumerate(token.top_logprobs[:num_top], start=1)
        others = {str(i): entry(i, value, rank) for rank, (i, value) in top}
        entries.append(own | others | own)
    return entries


class ScoredToken(NamedTuple):
    """A token of a prompt or of an answer."""

    token_id: int
    logprob: float | None  # None: nothing comes before it
    top_logprobs: tuple[tuple[int, float], ...]

    @classmethod
    def of_answer(cls, token: TokenOutput) -> Self:
        """Returns a generated token's scores."""
        return cls(token.token_id, _logprob(token), token.top_logprobs)

    @classmethod
    def of_prompt(cls, first: int, others: Iterable[PromptLogprob]) -> list[Self]:
        """Returns the scores of a prompt's tokens."""
        scored = [cls(token.token_id, token.logprob, token.top_logprobs) for token in others]
        return [cls(first, None, ()), *scored]


class CompletionLogprobs:
    """Builds `choices[].logprobs` of one completion, whose text offsets run on.

    Args:
        tokenizer: The model's.
        num_top: Alternatives per token; the chosen token stands beside them.
    """

    def __init__(self, tokenizer: Tokenizer, *, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def take(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """Returns the record of the next tokens."""
        texts, offsets = [], []
        for token in tokens:
            texts.append(self._tokenizer.token_text(token.token_id))
            offsets.append(self._offset)
            self._offset += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [
                None if token.logprob is None else max(token.logprob, _LOWEST) for token in tokens
            ],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (
            *token.top_logprobs[: self._num_top],
            (token.token_id, token.logprob),
        ):
            text = self._tokenizer.token_text(token_id)
            # Broken bytes read the same; the likelier stays, so that the maximum is the maximum.
            top[text] = max(logprob, top.get(text, _LOWEST))
        return top


def _logprob(token: TokenOutput) -> float:
    assert token.logprob is not None
    return token.logprob
