"""Log-probabilities of tokens in the two shapes that OpenAI's routes have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from linker_core.engine.messages import TokenOutput
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

    def take(self, tokens: Sequence[TokenOutput]) -> dict[str, Any]:
        """Returns the record of the next tokens."""
        texts, top, offsets = [], [], []
        for token in tokens:
            text = self._tokenizer.token_text(token.token_id)
            pairs = (*token.top_logprobs[: self._num_top], (token.token_id, _logprob(token)))
            top.append({self._tokenizer.token_text(i): max(value, _LOWEST) for i, value in pairs})
            texts.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(_logprob(token), _LOWEST) for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def _logprob(token: TokenOutput) -> float:
    assert token.logprob is not None
    return token.logprob
