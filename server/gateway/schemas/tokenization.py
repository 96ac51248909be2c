"""The bodies of the tokenizer's routes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from server.gateway.schemas.chat import Dialogue
from server.gateway.schemas.generation import TokenId
from server.gateway.schemas.parsing import Strict, Unhonoured


class TokenizeTextBody(Strict):
    """POST /tokenize, of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None  # true unless said otherwise
    return_token_strs: bool | None = None


class TokenizeChatBody(Dialogue):
    """POST /tokenize, of a dialogue."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None  # false unless said otherwise
    return_token_strs: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _is_no_text(cls, prompt: str | None) -> str | None:
        if prompt is not None:
            raise ValueError("send this or messages, not both")
        return prompt


class DetokenizeBody(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=2**20)]


TOKENIZE_NEUTRAL: dict[str, Unhonoured] = {
    "chat_template": Unhonoured(remedy="Templates come with models, never with requests"),
    "media_io_kwargs": Unhonoured({}),
    "mm_processor_kwargs": Unhonoured({}),
}
