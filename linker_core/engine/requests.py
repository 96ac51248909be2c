"""What a submitted sequence must satisfy before the engine takes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from linker_core.engine.grammar import GRAMMAR_PARAM
from linker_core.engine.grammar_builds import MAX_GRAMMAR_BYTES
from linker_core.engine.messages import SamplingParams, Submit
from linker_core.engine.resident_model import ResidentModel
from linker_core.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError


def check_submit(command: Submit, served: ResidentModel | None) -> ResidentModel:
    """Returns the model that serves a sequence.

    Raises:
        ModelNotFoundError: The model is not loaded, or is being unloaded.
        InvalidRequestError: No prompt, a token id beyond the model's vocabulary, or a constraint
            that cannot be met.
        ContextLengthError: Prompt and answer do not fit.
    """
    if served is None or served.unloading:
        raise ModelNotFoundError(f"The model '{command.model}' is not loaded.", param="model")
    if not command.prompt_ids:
        raise InvalidRequestError("The prompt is empty. Give at least one token.", param="prompt")
    _check_ids(command, served.vocab_size)
    _check_constraints(command.sampling)
    num_prompt, num_answer = len(command.prompt_ids), command.sampling.max_tokens
    if num_prompt + num_answer > served.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {served.max_model_len} tokens. However, "
            f"{num_prompt + num_answer} tokens were requested ({num_prompt} in the prompt, "
            f"{num_answer} for the answer). Shorten either (context_length_exceeded)."
        )
    return served


def _check_ids(command: Submit, vocab_size: int) -> None:
    """Refuses ids beyond the logits: one of them would reach into another sequence's row."""
    sampling = command.sampling
    lists: dict[str, Iterable[int]] = {
        "prompt": command.prompt_ids,
        "logit_bias": sampling.logit_bias,
        "stop_token_ids": sampling.stop_token_ids,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "bad_words": itertools.chain.from_iterable(sampling.bad_words),
    }
    for param, ids in lists.items():
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"{param} has token id {wrong}, outside this model's 0 to {vocab_size - 1}.",
                param=param,
            )


def _check_constraints(sampling: SamplingParams) -> None:
    if sampling.allowed_token_ids is not None and not sampling.allowed_token_ids:
        raise InvalidRequestError(
            "allowed_token_ids is empty, so nothing could be answered. Name at least one token, "
            "or leave it out.",
            param="allowed_token_ids",
        )
    if not all(sampling.bad_words):
        raise InvalidRequestError("bad_words has a word without tokens.", param="bad_words")
    size = 0 if sampling.grammar is None else len(sampling.grammar.encode(errors="replace"))
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(
            f"The grammar has {size} bytes; at most {MAX_GRAMMAR_BYTES} are compiled. Shorten it.",
            param=GRAMMAR_PARAM,
        )
