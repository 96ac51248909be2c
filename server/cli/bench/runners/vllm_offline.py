"""vLLM, stepped as `vllm.LLM.generate` steps it, with the time of every token."""

from __future__ import annotations

import itertools
import time
from typing import Any

import vllm  # type: ignore[import-not-found]  # only in its own environment
from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]


def load(settings: dict[str, Any]) -> Any:
    """Loads one model; `settings` are arguments of `vllm.LLM`."""
    # Prompts come as ids and answers are only counted: no text on either side.
    engine = vllm.LLM(**settings, skip_tokenizer_init=True).llm_engine
    numbers = itertools.count()

    def run_round(streams: list[dict[str, Any]], max_tokens: int) -> list[list[float]]:
        sampling = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        times: dict[str, list[float]] = {}
        for stream in streams:
            name = str(next(numbers))
            times[name] = []
            engine.add_request(name, {"prompt_token_ids": stream["prompt_ids"]}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                times[output.request_id].extend(now for _ in output.outputs[0].token_ids)
        return list(times.values())

    return run_round
