"""The bodies of requests: fields, types and bounds. Token ids are bounded later.

A known field that is not honoured must carry its neutral value; unknown fields are ignored with a
warning that names them, since clients forward parameters of their users.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from linker_core.errors import InvalidRequestError
from server.gateway.formats import ResponseFormat, StructuredOutputs
from server.settings import Seconds, SharingPolicy, parse_duration

logger = logging.getLogger(__name__)

_MAX_PROMPTS = 256
_MAX_WARNED = 8
FOR_EVER_S = 1e9  # the longest that a model may be told to stay
_MAX_FITTED = 16  # variants of one joint plan; each is scanned and priced

Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_Request = TypeVar("_Request", bound=BaseModel)


def _stay(value: object) -> object:
    found = parse_duration(value)
    return FOR_EVER_S if found is None and value is not None else found


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters are taken")
    return text


CacheSalt = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
# How long a model stays unused: seconds, or a text such as "5m"; negative: for ever.
Stay = Annotated[Seconds | None, BeforeValidator(_stay)]
BadWord = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a dialogue."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)
    tool_call_id: None = None
    function_call: None = None


class StreamOptions(_Strict):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(_Strict):
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
    logit_bias: dict[str, Bias] | None = Field(default=None, max_length=1024)
    allowed_token_ids: list[TokenId] | None = Field(default=None, min_length=1, max_length=2**18)
    bad_words: list[BadWord] | None = Field(default=None, max_length=256)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
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

    def stop_texts(self) -> tuple[str, ...]:
        """Returns the stop strings, one or many."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool | None = None
    parallel_tool_calls: bool | None = None  # without tools there is nothing to call


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=_MAX_PROMPTS),
        ]
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)
    max_tokens: int | None = Field(default=None, ge=0)  # 0: the prompt only, so with echo
    echo: bool | None = None


class ReplanBody(BaseModel):
    """PATCH /models/{name}, and how every plan is asked for.

    Unlike generation, operators' routes take no unknown field.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    policy: SharingPolicy | None = None
    budget_kl: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_bytes: int | None = Field(default=None, ge=0, lt=2**63)
    tau_cos: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    tau_frob: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    tier: str | None = None


class ChangeBody(ReplanBody):
    """PATCH /models/{name}. What is left out stays as it is."""

    pin: bool | None = None
    alias: str | None = None  # null takes it away
    keep_alive: Stay = None  # null: the settings'


class SharingBody(ReplanBody):
    """What onboarding and its dry run share."""

    source: str
    revision: str | None = None  # of a source on the hub
    donor: str | None = None  # None: auto


class OnboardBody(SharingBody):
    """POST /models."""

    name: str
    pin: bool | None = None
    keep_alive: Stay = None  # null: the settings'


class PlanBody(SharingBody):
    """POST /models/plan. Name and options decide nothing; they may come along."""

    name: str | None = None
    pin: bool | None = None
    keep_alive: Stay = None


class LoadBody(BaseModel):
    """POST /models/load."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    wait: bool | None = None  # null: true


class UnloadBody(BaseModel):
    """POST /models/unload."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    rehome: bool | None = None  # null: false


class FittedModel(BaseModel):
    """One of the variants of a joint plan."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    source: str
    name: str | None = Field(default=None, min_length=1, max_length=256)  # None: the source


class FitBody(BaseModel):
    """POST /models/plan of several variants that are to fit into one memory."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    models: list[FittedModel] = Field(min_length=1, max_length=_MAX_FITTED)
    donor: str | None = None  # None: auto
    budget_bytes: int = Field(ge=0, lt=2**63)


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "variant_mode": (None, "planned"),
}
CHAT_NEUTRAL: dict[str, tuple[object, ...]] = {
    **_NEUTRAL,
    "audio": (None,),
    "chat_template": (None,),  # templates come with models, never with requests
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}
COMPLETION_NEUTRAL: dict[str, tuple[object, ...]] = {
    **_NEUTRAL,
    "best_of": (None, 1),
    "suffix": (None, ""),
}


def parse_request(
    kind: type[_Request],
    body: Mapping[str, Any],
    *,
    neutral: Mapping[str, tuple[object, ...]] = MappingProxyType({}),
) -> _Request:
    """Builds a request record from a parsed body.

    Raises:
        InvalidRequestError: A field of the wrong type or out of bounds, or one that cannot be
            honoured; `param` is its dotted path.
    """
    for name, values in neutral.items():
        if name in body and body[name] not in values:
            raise InvalidRequestError(f"{name} is not supported here; leave it out.", param=name)
    unknown = [name for name in body if name not in kind.model_fields and name not in neutral]
    if unknown and kind.model_config.get("extra") != "forbid":
        names = [name[:64] for name in unknown[:_MAX_WARNED]]
        logger.warning("ignored %d unknown request fields: %r", len(unknown), names)
    known = {name: value for name, value in body.items() if name not in neutral}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        faults = [(_dotted(body, fault["loc"]), fault["msg"]) for fault in found]
        first = faults[0][0]
        # Of a field that may be of several types, the alternative that fits best says most.
        param, message = max(
            (fault for fault in faults if fault[0].startswith(first)),
            key=lambda fault: fault[0].count("."),
        )
        raise InvalidRequestError(f"{param}: {message}.", param=param) from None


def _dotted(body: object, loc: tuple[int | str, ...]) -> str:
    """Returns the path of a fault; the parts that name alternatives of a type are left out."""
    parts: list[str] = []
    for number, part in enumerate(loc):
        if isinstance(body, dict) and (part in body or number == len(loc) - 1):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        parts.append(str(part)[:64])
    return ".".join(parts)
