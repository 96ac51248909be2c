"""Lets a variant answer prompts itself, greedily and unshared, with the engine that serves it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice

from linker_core.config import EngineConfig, MatmulPrecision
from linker_core.engine.engine import Engine
from linker_core.engine.messages import (
    Event,
    LoadFailed,
    LoadModel,
    RequestFailed,
    SamplingParams,
    StepOutput,
    Submit,
)
from linker_core.errors import from_record
from linker_core.pace import Pace
from linker_core.sharing.planner import plan_donor
from linker_core.tuning.calibration import MAX_PROMPT_TOKENS, CalibrationPrompt
from linker_core.tuning.memory import ANSWER_SEQUENCES, ANSWER_TOKENS
from linker_core.tuning.request import Device
from linker_core.weights.checkpoint import Checkpoint

_MODEL = "variant"


def own_answers(
    variant: Checkpoint,
    prompts: Sequence[CalibrationPrompt],
    *,
    enough_tokens: int,
    device: Device,
    pace: Pace,
    precision: MatmulPrecision,
) -> list[list[int]]:
    """Returns the variant's greedy answers, stop token included, to the first prompts.

    The whole variant is resident for as long as this takes.

    Args:
        variant: Whose answers.
        prompts: In the order in which they are answered.
        enough_tokens: No further prompts are answered once the answers have as many tokens.
        device: Where.
        pace: Slows the work down while sequences run.
        precision: Of the products: that of the serving engine.

    Raises:
        InsufficientCapacityError: The whole variant does not fit.
        LinkerError: The engine could not load it, or failed.
    """
    engine = Engine(
        EngineConfig(
            device=device,
            kv_cache_tokens=ANSWER_SEQUENCES * (MAX_PROMPT_TOKENS + ANSWER_TOKENS),
            max_num_seqs=ANSWER_SEQUENCES,
            matmul_precision=precision,
        )
    )
    engine.handle(
        LoadModel(
            model=_MODEL,
            path=str(variant.path),
            identity=variant.identity,
            config=variant.config,
            plan=plan_donor(variant, fingerprint=""),
            donor=None,
            max_model_len=None,
        )
    )
    _run(engine, pace)
    answers: list[list[int]] = []
    waiting = iter(prompts)
    while sum(map(len, answers)) < enough_tokens:
        group = list(islice(waiting, ANSWER_SEQUENCES))
        if not group:
            break
        answers += _answer(engine, group, variant.eos_token_ids, pace)
    return answers


def _answer(
    engine: Engine,
    prompts: Iterable[CalibrationPrompt],
    stop_token_ids: frozenset[int],
    pace: Pace,
) -> list[list[int]]:
    answers: dict[str, list[int]] = {}
    sampling = SamplingParams(
        max_tokens=ANSWER_TOKENS, temperature=0.0, stop_token_ids=stop_token_ids
    )
    for number, prompt in enumerate(prompts):
        answers[str(number)] = []
        engine.handle(
            Submit(
                request_id=str(number),
                model=_MODEL,
                prompt_ids=prompt.token_ids,
                sampling=sampling,
            )
        )
    for event in _run(engine, pace):
        if isinstance(event, StepOutput):
            for token in event.tokens:
                answers[token.request_id].append(token.token_id)
    return list(answers.values())


def _run(engine: Engine, pace: Pace) -> list[Event]:
    """Steps the engine until nothing is left to do.

    Raises:
        LinkerError: What failed.
    """
    events: list[Event] = []
    while engine.has_work:
        started = time.monotonic()
        events += engine.step()
        pace.after_work(time.monotonic() - started)
    for event in events:
        if isinstance(event, LoadFailed | RequestFailed):
            raise from_record(dict(event.error))
    return events
