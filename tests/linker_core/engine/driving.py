"""Driving an engine by messages, as the worker does, without a process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from linker_core.config import EngineConfig
from linker_core.engine.engine import Engine
from linker_core.engine.messages import (
    BaseFiles,
    Event,
    FinishReason,
    LoadFailed,
    LoadModel,
    ModelLoaded,
    RequestFailed,
    SamplingParams,
    Snapshot,
    StepOutput,
    Submit,
    TokenOutput,
)
from linker_core.sharing.delta import DeltaFile, open_weights
from linker_core.sharing.plan import Policy, SharePlan, count_blocks
from linker_core.sharing.planner import plan_donor
from linker_core.sharing.rungs import Rung
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.engine.families import nothing

SMALL = EngineConfig(kv_cache_tokens=1024, page_tokens=4, max_batch_tokens=24, max_num_seqs=8)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def load_message(
    model: str,
    path: Path,
    *,
    donor: str | None = None,
    aliased: Callable[[str], bool] = nothing,
    max_model_len: int | None = None,
    plan: SharePlan | None = None,
    replaces: bool = False,
    base: Path | None = None,
) -> LoadModel:
    """Loads `path` with the aliases that are named, or as planned; a delta file as it is planned.

    A model's name is its fingerprint, too. `base` is the checkpoint that a plan leans on.
    """
    with open_weights(path) as source:
        return LoadModel(
            model=model,
            path=str(path),
            identity=source.identity,
            config=source.config,
            plan=plan or _plan(model, source, donor, aliased),
            donor=donor,
            max_model_len=max_model_len,
            replaces=replaces,
            base=None if base is None else base_files(base),
        )


def base_files(path: Path) -> BaseFiles:
    """The checkpoint that plans lean on, as it is now."""
    with Checkpoint.open(path) as base:
        return BaseFiles(path=str(path), identity=base.identity, config=base.config)


def _plan(
    model: str,
    checkpoint: Checkpoint | DeltaFile,
    donor: str | None,
    aliased: Callable[[str], bool],
) -> SharePlan:
    if isinstance(checkpoint, DeltaFile):
        return checkpoint.plan
    plan = plan_donor(checkpoint, fingerprint=model)
    if donor is None:
        return plan
    rungs = {name: Rung.ALIAS if aliased(name) else Rung.OWN for name in checkpoint.tensors}
    own = (name for name, rung in rungs.items() if rung is Rung.OWN)
    return replace(
        plan,
        policy=Policy.THRESHOLDS,
        donor_fingerprint=donor,
        rungs=rungs,
        unique_bytes=sum(checkpoint.tensors[name].nbytes for name in own),
        blocks=count_blocks(rungs, checkpoint),
    )


class Driver:
    """An engine with everything it has said, sorted by request."""

    def __init__(
        self, config: EngineConfig = SMALL, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.engine = Engine(config, clock=clock)
        self.events: list[Event] = []
        self.outputs: dict[str, list[TokenOutput]] = defaultdict(list)
        self.errors: dict[str, Mapping[str, str | None]] = {}
        self._number = 0

    def step(self) -> list[Event]:
        events = self.engine.step()
        self.events.extend(events)
        for event in events:
            if isinstance(event, StepOutput):
                for token in event.tokens:
                    self.outputs[token.request_id].append(token)
            elif isinstance(event, RequestFailed):
                self.errors[event.request_id] = event.error
        for family in self.engine.residents.families.values():
            family.scheduler.check_integrity()
        self.engine.residents.check_integrity()
        return events

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.engine.has_work:
            self.step()
        self.step()

    def load(self, message: LoadModel) -> ModelLoaded | LoadFailed:
        self.engine.handle(message)
        before = len(self.events)
        self.run()
        answers = [e for e in self.events[before:] if isinstance(e, ModelLoaded | LoadFailed)]
        assert len(answers) == 1
        return answers[0]

    def submit(
        self,
        model: str,
        prompt: list[int],
        sampling: SamplingParams = GREEDY,
        *,
        submitted_s: float | None = None,
    ) -> str:
        self._number += 1
        request_id = f"r{self._number}"
        self.engine.handle(
            Submit(
                request_id=request_id,
                model=model,
                prompt_ids=tuple(prompt),
                sampling=sampling,
                submitted_s=submitted_s,
            )
        )
        return request_id

    def tokens(self, request_id: str) -> list[int]:
        return [token.token_id for token in self.outputs[request_id]]

    def reason(self, request_id: str) -> FinishReason | None:
        return self.outputs[request_id][-1].finish_reason

    def generate(
        self, model: str, prompt: list[int], sampling: SamplingParams = GREEDY
    ) -> list[int]:
        """Runs one request alone to its end."""
        request_id = self.submit(model, prompt, sampling)
        self.run()
        assert request_id not in self.errors, self.errors
        return self.tokens(request_id)

    def snapshot(self) -> Snapshot:
        """The last snapshot that was reported."""
        return [event for event in self.events if isinstance(event, Snapshot)][-1]
