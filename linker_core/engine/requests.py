"""What a submitted sequence must satisfy before the engine takes it."""

from __future__ import annotations

from linker_core.engine.messages import Submit
from linker_core.engine.residents import ResidentModel
from linker_core.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError


def check_submit(command: Submit, served: ResidentModel | None) -> ResidentModel:
    """Returns the model that serves a sequence.

    Raises:
        ModelNotFoundError: The model is not loaded, or is being unloaded.
        InvalidRequestError: No prompt, or a token id beyond the model's vocabulary.
        ContextLengthError: Prompt and answer do not fit.
    """
    if served is None or served.unloading:
        raise ModelNotFoundError(f"The model '{command.model}' is not loaded.", param="model")
    if not command.prompt_ids:
        raise InvalidRequestError("The prompt is empty. Give at least one token.", param="prompt")
    _check_ids(command, served.vocab_size)
    num_prompt, num_answer = len(command.prompt_ids), command.sampling.max_tokens
    if num_prompt + num_answer > served.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {served.max_model_len} tokens. However, "
            f"{num_prompt + num_answer} tokens were requested ({num_prompt} in the prompt, "
            f"{num_answer} for the answer). Shorten either (context_length_exceeded)."
        )
    return served


def _check_ids(command: Submit, vocab_size: int) -> None:
    low, high = min(command.prompt_ids), max(command.prompt_ids)
    if low < 0 or high >= vocab_size:
        raise InvalidRequestError(
            f"The prompt has token id {low if low < 0 else high}, outside this model's 0 to "
            f"{vocab_size - 1}.",
            param="prompt",
        )
    for token_id in command.sampling.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"logit_bias names token id {token_id}, outside this model's 0 to "
                f"{vocab_size - 1}.",
                param="logit_bias",
            )
