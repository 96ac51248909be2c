"""From a request to sampling parameters, checked against the model. Blocking: it tokenises."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from linker_core.engine.messages import SamplingParams
from linker_core.errors import InvalidRequestError
from server.gateway.schemas.generation import GenerationRequest
from server.residency.catalog import ServedModel

_GREEDY_BELOW = 1e-5  # a smaller temperature would overflow the division by it


def sampling_params(
    request: GenerationRequest,
    model: ServedModel,
    *,
    grammar: str | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Returns the parameters but for the length; what is not said comes from the model.

    Args:
        request: The checked body.
        model: The model to run.
        grammar: What the answer must follow.
        logprobs: Alternatives to report per token, None for no report.
        prompt_logprobs: The same for the tokens of the prompt.

    Raises:
        InvalidRequestError: A token id beyond the logits, or a word that has no tokens.
    """
    defaults = model.text.generation

    def choose(value: float | None, name: str, otherwise: float) -> float:
        return float(defaults.get(name, otherwise)) if value is None else value

    temperature = choose(request.temperature, "temperature", 1.0)
    top_k = int(defaults.get("top_k", 0)) if request.top_k is None else request.top_k
    allowed = request.allowed_token_ids
    check_token_ids(allowed or (), model, param="allowed_token_ids")
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
        stop_token_ids=_stop_token_ids(request, model),
        bad_words=_bad_words(request.bad_words or (), model),
        allowed_token_ids=None if allowed is None else frozenset(allowed),
        grammar=grammar,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def check_token_ids(ids: Collection[int], model: ServedModel, *, param: str) -> None:
    """Bounds ids by the width of the logits, which may exceed the tokenizer's vocabulary.

    Raises:
        InvalidRequestError: One of them lies beyond.
    """
    width = model.text.config.vocab_size
    if ids and max(ids) >= width:
        raise InvalidRequestError(f"{param}: token ids end at {width - 1}.", param=param)


def _stop_token_ids(request: GenerationRequest, model: ServedModel) -> frozenset[int]:
    stop_ids = frozenset(request.stop_token_ids or ())
    check_token_ids(stop_ids, model, param="stop_token_ids")
    if request.ignore_eos:
        return stop_ids
    width = model.text.config.vocab_size
    return stop_ids | {token for token in model.text.eos_token_ids if token < width}


def _logit_bias(request: GenerationRequest, model: ServedModel) -> dict[int, float]:
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise InvalidRequestError("logit_bias: keys are token ids.", param="logit_bias")
        bias[int(key)] = value
    check_token_ids(bias, model, param="logit_bias")
    return bias


def _bad_words(words: Sequence[str], model: ServedModel) -> tuple[tuple[int, ...], ...]:
    """Returns the tokens of each word, at the beginning of a text and after a space."""
    found: list[tuple[int, ...]] = []
    for word in words:
        bare = word.lstrip() or word
        start, inside = (
            tuple(model.text.tokenizer.encode(prefix + bare, add_special_tokens=False))
            for prefix in ("", " ")
        )
        if not start:
            raise InvalidRequestError(f"bad_words: {word!r} has no tokens.", param="bad_words")
        check_token_ids((*start, *inside), model, param="bad_words")
        found.append(start)
        # Where the space is a token by itself, whoever bans the word has banned this too.
        if inside[-len(start) :] != start:
            found.append(inside)
    return tuple(found)
