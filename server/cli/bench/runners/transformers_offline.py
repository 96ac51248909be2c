"""`generate` of transformers, one batch a round, with the time of every step."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class _Clock(StoppingCriteria):
    """Stops nothing; notes when each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(settings: dict[str, Any]) -> Any:
    """Loads one model; `settings` name the directory `model` and the `dtype`."""
    dtype = getattr(torch, settings["dtype"])
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
    # Set to nothing rather than given as an argument: that would fall back to the model's own.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def run_round(streams: list[dict[str, Any]], max_tokens: int) -> list[list[float]]:
        prompts = torch.tensor([stream["prompt_ids"] for stream in streams])
        clock = _Clock()
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=max_tokens,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        return [clock.times] * len(streams)

    return run_round
