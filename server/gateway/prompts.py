"""From a request to token ids and sampling parameters, checked against the model. Blocking."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from linker_core.engine.messages import SamplingParams
from linker_core.errors import ContextLengthError, InvalidRequestError
from server.gateway.generation import SequenceSpec, TextOptions
from server.gateway.schemas import ChatRequest, CompletionRequest, GenerationRequest, Message
from server.onboarding.catalog import ServedModel

COMPLETION_MAX_TOKENS = 16  # where the client does not say
_GREEDY_BELOW = 1e-5  # a smaller temperature would overflow the division by it


def chat_prompt(request: ChatRequest, model: ServedModel) -> list[int]:
    """Renders a dialogue with the model's own template and tokenises it.

    Raises:
        InvalidRequestError: The model has no template, or the template refuses the messages.
    """
    text = model.text
    if text.template is None:
        raise InvalidRequestError(
            f"The model {model.name!r} has no chat template; use /v1/completions.", param="model"
        )
    rendered = text.template.render(
        [_template_record(message) for message in request.messages],
        add_generation_prompt=request.add_generation_prompt is not False,
        bos_token=text.tokenizer.bos_token,
        eos_token=text.tokenizer.eos_token,
    )
    return text.tokenizer.encode(rendered, add_special_tokens=request.add_special_tokens is True)


def completion_prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """Returns the prompts' token ids; ids given by the client are taken as they are.

    Raises:
        InvalidRequestError: A text that the tokenizer refuses, or an id beyond the vocabulary.
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
    encode = model.text.tokenizer.encode
    ids = [
        encode(one, add_special_tokens=special) if isinstance(one, str) else one for one in prompts
    ]
    for one in ids:
        _check_token_ids(one, model, param="prompt")
    return ids


def sequences(
    request: GenerationRequest,
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    *,
    request_id: str,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> list[SequenceSpec]:
    """Returns every sequence of a request, prompt by prompt.

    Args:
        request: The checked body.
        model: The model to run.
        prompts: Token ids.
        request_id: Unique; the sequences' ids are derived from it.
        max_tokens: What the client asks for, if it does.
        default_max_tokens: Otherwise, cut to the context; None: all that is left of it.
        logprobs: Alternatives to report per token, None for no report.

    Raises:
        InvalidRequestError: An empty prompt, ids out of range, or contradictory limits.
        ContextLengthError: A prompt and its answer do not fit.
    """
    arrived_at, n = time.monotonic(), request.n or 1
    options = _text_options(request)
    base = _sampling(request, model, logprobs=logprobs)
    specs: list[SequenceSpec] = []
    for prompt in prompts:
        limit = _answer_tokens(request, len(prompt), model, max_tokens, default_max_tokens)
        if base.min_tokens > limit:
            raise InvalidRequestError(
                f"min_tokens is {base.min_tokens}, max_tokens {limit}.", param="min_tokens"
            )
        for choice in range(n):
            seed = None if base.seed is None else (base.seed + choice) % 2**63
            specs.append(
                SequenceSpec(
                    request_id=f"{request_id}-{len(specs)}",
                    index=len(specs),
                    model=model,
                    prompt_ids=tuple(prompt),
                    sampling=replace(base, max_tokens=limit, seed=seed),
                    text=options,
                    arrived_at=arrived_at,
                )
            )
    return specs


def _template_record(message: Message) -> Mapping[str, object]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    name = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": content or "", **name}


def _answer_tokens(
    request: GenerationRequest,
    num_prompt: int,
    model: ServedModel,
    max_tokens: int | None,
    default: int | None,
) -> int:
    """Returns how many tokens an answer may have."""
    prompt_field = "messages" if isinstance(request, ChatRequest) else "prompt"
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
            param=prompt_field if left < 1 else "max_tokens",
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


def _sampling(
    request: GenerationRequest, model: ServedModel, *, logprobs: int | None
) -> SamplingParams:
    """Returns the parameters but for the length; what is not said comes from the model."""
    defaults = model.text.generation

    def choose(value: float | None, name: str, otherwise: float) -> float:
        return float(defaults.get(name, otherwise)) if value is None else value

    temperature = choose(request.temperature, "temperature", 1.0)
    top_k = int(defaults.get("top_k", 0)) if request.top_k is None else request.top_k
    stop_ids = frozenset(request.stop_token_ids or ())
    _check_token_ids(stop_ids, model, param="stop_token_ids")
    if not request.ignore_eos:
        width = model.text.config.vocab_size
        stop_ids |= {token for token in model.text.eos_token_ids if token < width}
    return SamplingParams(
        max_tokens=1,
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=choose(request.top_p, "top_p", 1.0) or 1.0,
        top_k=top_k if top_k > 0 else None,
        min_p=choose(request.min_p, "min_p", 0.0),
        seed=request.seed,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        repetition_penalty=choose(request.repetition_penalty, "repetition_penalty", 1.0),
        logit_bias=_logit_bias(request, model),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=stop_ids,
        logprobs=logprobs,
    )


def _logit_bias(request: GenerationRequest, model: ServedModel) -> dict[int, float]:
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise InvalidRequestError("logit_bias: keys are token ids.", param="logit_bias")
        bias[int(key)] = value
    _check_token_ids(bias, model, param="logit_bias")
    return bias


def _check_token_ids(
    ids: Sequence[int] | frozenset[int] | Mapping[int, float], model: ServedModel, *, param: str
) -> None:
    """Bounds ids by the width of the logits, which may exceed the tokenizer's vocabulary."""
    width = model.text.config.vocab_size
    if ids and max(ids) >= width:
        raise InvalidRequestError(f"{param}: token ids end at {width - 1}.", param=param)
