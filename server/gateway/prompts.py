"""From a request to token ids and sequences, checked against the model.

Blocking, but for the text of a dialogue, which comes from other processes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from linker_core.errors import ContextLengthError, InvalidRequestError
from linker_core.text.template_source import template_variables
from server.gateway.dialogue import Rendering, is_much, rendering
from server.gateway.formats import constraint_of
from server.gateway.generation import SequenceSpec, TextOptions
from server.gateway.sampling import check_token_ids, sampling_params
from server.gateway.schemas.chat import ChatRequest, Dialogue
from server.gateway.schemas.generation import CompletionRequest, GenerationRequest
from server.rendering.templates import Templates
from server.residency.catalog import ServedModel

COMPLETION_MAX_TOKENS = 16  # where the client does not say


class Lengths(NamedTuple):
    """How long an answer may be."""

    asked: int | None  # what the client says; 0: the prompt only
    default: int | None  # otherwise, cut to the context; None: all that is left of it


class Reports(NamedTuple):
    """Alternatives to report per token, None for no report."""

    logprobs: int | None
    prompt_logprobs: int | None


async def chat_text(request: Dialogue, model: ServedModel, templates: Templates) -> str:
    """Renders a dialogue with the model's own template.

    Raises:
        InvalidRequestError: The model has no template, or the template refuses the messages or
            comes to no end with them.
        LinkerError: See `Templates.render`.
    """
    text = model.text
    if text.template is None:
        raise InvalidRequestError(
            f"The model {model.name!r} has no chat template; use /v1/completions.", param="model"
        )
    given = await _given(request, text.template.text)
    variables = template_variables(
        given.messages,
        add_generation_prompt=given.add_generation_prompt,
        bos_token=text.tokenizer.bos_token,
        eos_token=text.tokenizer.eos_token,
        tools=given.tools,
        more=given.more,
    )
    return given.cut(await templates.render(text.template, variables))


async def _given(request: Dialogue, template: str) -> Rendering:
    """Returns what the template is given; much of it keeps nobody else waiting."""
    work = partial(rendering, request, template)
    return await asyncio.to_thread(work) if is_much(request, template) else work()


def chat_prompt(request: ChatRequest, model: ServedModel, text: str) -> list[int]:
    """Tokenises the text of a dialogue, which holds its special tokens.

    Raises:
        InvalidRequestError: The tokenizer refuses it.
        ContextLengthError: It cannot be short enough.
    """
    special = request.add_special_tokens is True
    return _encoded(text, request, model, add_special_tokens=special)


def completion_prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """Returns the prompts' token ids; ids given by the client are taken as they are.

    Raises:
        InvalidRequestError: A text that the tokenizer refuses, or an id beyond the vocabulary.
        ContextLengthError: A text that cannot be short enough.
    """
    prompt = request.prompt
    prompts: Sequence[str | list[int]]
    if isinstance(prompt, str):
        prompts = [prompt]
    elif isinstance(prompt[0], int):
        prompts = [[token for token in prompt if isinstance(token, int)]]
    else:
        prompts = [one for one in prompt if not isinstance(one, int)]
    special = request.add_special_tokens is not False
    ids = [
        _encoded(one, request, model, add_special_tokens=special) if isinstance(one, str) else one
        for one in prompts
    ]
    for one in ids:
        check_token_ids(one, model, param="prompt")
    return ids


def truncated(
    ids: Sequence[int], request: GenerationRequest, model: ServedModel, *, max_tokens: int | None
) -> tuple[int, ...]:
    """Returns the last tokens of a prompt, as many as `truncate_prompt_tokens` leaves.

    Raises:
        InvalidRequestError: It would leave none, or more than the model takes.
    """
    keep = request.truncate_prompt_tokens
    if keep is None:
        return tuple(ids)
    if keep == 0 or keep > model.max_model_len:
        raise InvalidRequestError(
            f"truncate_prompt_tokens is {keep}; it is -1 or lies within 1 to "
            f"{model.max_model_len}, this model's context.",
            param="truncate_prompt_tokens",
        )
    if keep < 0:
        keep = max(1, model.max_model_len - max(1, max_tokens or 1))
    return tuple(ids[-keep:])


def sequences(
    request: GenerationRequest,
    model: ServedModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    request_id: str,
    lengths: Lengths,
    reports: Reports,
) -> list[SequenceSpec]:
    """Returns every sequence of a request, prompt by prompt.

    Args:
        request: The checked body.
        model: The model to run.
        prompts: Token ids.
        request_id: Unique; the sequences' ids are derived from it.
        lengths: Of the answers.
        reports: What they say of their tokens.

    Raises:
        InvalidRequestError: An empty prompt, ids out of range, contradictory limits, or a
            constraint that is none.
        ContextLengthError: A prompt and its answer do not fit.
    """
    arrived_at, n = time.monotonic(), request.n or 1
    options = _text_options(request)
    constraint = constraint_of(request.response_format, request.structured_outputs)
    grammar, grammar_param = (None, None) if constraint is None else constraint
    base = sampling_params(request, model, grammar=grammar, **reports._asdict())
    specs: list[SequenceSpec] = []
    for prompt in prompts:
        limit = _answer_tokens(request, len(prompt), model, lengths)
        if base.min_tokens > limit:
            raise InvalidRequestError(
                f"min_tokens is {base.min_tokens}, max_tokens {limit}.", param="min_tokens"
            )
        for choice in range(n):
            seed = None if base.seed is None else (base.seed + choice) % 2**63
            # Choices share their prompt, and what it reports cannot come from cached pages.
            prompt_logprobs = base.prompt_logprobs if choice == 0 else None
            specs.append(
                SequenceSpec(
                    request_id=f"{request_id}-{len(specs)}",
                    index=len(specs),
                    model=model,
                    prompt_ids=prompt,
                    # A prompt is computed by asking for the token after it.
                    sampling=replace(
                        base,
                        max_tokens=max(1, limit),
                        seed=seed,
                        prompt_logprobs=prompt_logprobs,
                    ),
                    text=options,
                    arrived_at=arrived_at,
                    priority=request.priority or 0,
                    cache_salt=request.cache_salt or "",
                    grammar_param=grammar_param,
                    prompt_only=limit == 0,
                )
            )
    return specs


def _encoded(
    text: str, request: GenerationRequest, model: ServedModel, *, add_special_tokens: bool
) -> list[int]:
    """Returns the ids of a text, unless its length alone says that they are too many."""
    tokenizer, param = model.text.tokenizer, _prompt_field(request)
    if tokenizer.max_token_chars is not None and request.truncate_prompt_tokens is None:
        most = model.max_model_len * tokenizer.max_token_chars
        if len(text) > most:
            raise ContextLengthError(
                f"This model's maximum context length is {model.max_model_len} tokens, which "
                f"stand for {most} characters at the very most. However, your prompt has "
                f"{len(text)}. Shorten it (context_length_exceeded).",
                param=param,
            )
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _prompt_field(request: GenerationRequest) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"


def _limit_field(request: GenerationRequest) -> str:
    newer = isinstance(request, ChatRequest) and request.max_completion_tokens is not None
    return "max_completion_tokens" if newer else "max_tokens"


def _answer_tokens(
    request: GenerationRequest, num_prompt: int, model: ServedModel, lengths: Lengths
) -> int:
    """Returns how many tokens an answer may have; 0 wants room for one all the same."""
    max_tokens, default = lengths
    prompt_field = _prompt_field(request)
    if num_prompt == 0:
        raise InvalidRequestError(
            "The prompt is empty; give at least one token.", param=prompt_field
        )
    left = model.max_model_len - num_prompt
    if left < 1 or (max_tokens is not None and max_tokens > left):
        wanted = max_tokens or 1
        raise ContextLengthError(
            f"This model's maximum context length is {model.max_model_len} tokens. However, you "
            f"requested {num_prompt + wanted} tokens ({num_prompt} in the prompt, {wanted} for "
            "the answer). Shorten the prompt or ask for fewer tokens (context_length_exceeded).",
            param=prompt_field if left < 1 else _limit_field(request),
        )
    if max_tokens is not None:
        return max_tokens
    return left if default is None else min(default, left)


def _text_options(request: GenerationRequest) -> TextOptions:
    stop = request.stop_texts()
    if stop and request.min_tokens:
        raise InvalidRequestError(
            "min_tokens cannot be combined with stop strings; use stop_token_ids.",
            param="min_tokens",
        )
    return TextOptions(
        stop=stop,
        include_stop=request.include_stop_str_in_output is True,
        skip_special_tokens=request.skip_special_tokens is not False,
    )
