"""What both generation routes take, and the body of text completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from server.gateway.formats import ResponseFormat, StructuredOutputs
from server.gateway.schemas.parsing import Strict, Unhonoured, few

_MAX_PROMPTS = 256

Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0)]
# A million faults of one list would take seconds to write down.
_TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]

VariantMode = Literal["planned", "unshared"]  # unshared: bit for bit the weights onboarded


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters are taken")
    return text


CacheSalt = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
BadWord = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Strict):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(Strict):
    """What both routes share."""

    model: str
    n: int | None = Field(default=None, ge=1, le=8)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, le=2**31)  # 0 and -1: all tokens
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=256)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(default=None, ge=1e-3, le=100, allow_inf_nan=False)
    logit_bias: Annotated[dict[str, Bias] | None, Field(max_length=1024), few(1024)] = None
    allowed_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=2**18)] | None
    ) = None
    bad_words: list[BadWord] | None = Field(default=None, max_length=256)
    response_format: ResponseFormat | None = None
    structured_outputs: Annotated[StructuredOutputs | None, few(16)] = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=2**31)  # -1: what fits
    priority: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1)  # smaller is sooner
    cache_salt: CacheSalt | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    variant_mode: VariantMode | None = None  # whose weights answer; None: as planned

    def stop_texts(self) -> tuple[str, ...]:
        """Returns the stop strings, one or many."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=_MAX_PROMPTS)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(fail_fast=True, min_length=1, max_length=_MAX_PROMPTS)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)
    max_tokens: int | None = Field(default=None, ge=0)  # 0: the prompt only, so with echo
    echo: bool | None = None


# Known fields that cannot be honoured, with the values under which they say nothing.
_USE_STRUCTURED = "Use structured_outputs"
NEUTRAL: dict[str, Unhonoured] = {
    "early_stopping": Unhonoured(False),
    "ec_transfer_params": Unhonoured({}),
    "guided_choice": Unhonoured(remedy=_USE_STRUCTURED),
    "guided_decoding_backend": Unhonoured(remedy=_USE_STRUCTURED),
    "guided_grammar": Unhonoured(remedy=_USE_STRUCTURED),
    "guided_json": Unhonoured(remedy=_USE_STRUCTURED),
    "guided_regex": Unhonoured(remedy=_USE_STRUCTURED),
    "guided_whitespace_pattern": Unhonoured(remedy=_USE_STRUCTURED),
    "kv_transfer_params": Unhonoured({}),
    "length_penalty": Unhonoured(1),
    "logits_processors": Unhonoured([]),
    "logprob_token_ids": Unhonoured(),
    "repetition_detection": Unhonoured(),
    "request_id": Unhonoured(remedy="Send the header X-Request-Id"),
    "return_prompt_text": Unhonoured(False),
    "return_tokens_as_token_ids": Unhonoured(False, remedy="Use return_token_ids"),
    "service_tier": Unhonoured("auto", "default"),
    "spaces_between_special_tokens": Unhonoured(True),
    "stream_interval": Unhonoured(1),
    "structural_tag": Unhonoured(remedy=_USE_STRUCTURED),
    "truncation_side": Unhonoured("left"),
    "use_beam_search": Unhonoured(False),
    "vllm_xargs": Unhonoured({}),
}
COMPLETION_NEUTRAL: dict[str, Unhonoured] = {
    **NEUTRAL,
    "best_of": Unhonoured(1, remedy="Use n"),
    "prompt_embeds": Unhonoured(),
    "suffix": Unhonoured(""),
}
