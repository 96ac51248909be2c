"""Residency and serving on a CUDA device; torch, transformers, accelerate and pytest suffice."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from linker_core.config import EngineConfig
from linker_core.engine.engine import Engine
from linker_core.engine.messages import (
    LoadFailed,
    LoadModel,
    ModelLoaded,
    RequestFailed,
    SamplingParams,
    StepOutput,
    Submit,
)
from linker_core.residency.pool import Pool, ResidentVariant
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_donor, plan_variant
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MIB = 2**20
SLACK_BYTES = 64 * MIB
# The caching allocator rounds every tensor up to 512 bytes.
ROUNDING_BYTES = 512


@pytest.fixture(scope="module")
def large_family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Checkpoint]]:
    """A donor of about 400 MB, two near copies and a far one."""
    folder = tmp_path_factory.mktemp("large")
    donor = make_checkpoint(
        folder / "base", layers=12, hidden=1024, intermediate=4096, vocab_size=16_000
    )
    # The last one is far, so that all of it is unique: held twice, it would exceed the slack.
    scales = (0.01, 0.01, 0.5)
    copies = [
        make_variant(folder / f"copy-{n}", donor, scale=scale, seed=n)
        for n, scale in enumerate(scales)
    ]
    with ExitStack() as stack:
        yield [stack.enter_context(Checkpoint.open(path)) for path in (donor, *copies)]


def plans(checkpoints: list[Checkpoint]) -> list[SharePlan]:
    donor, *copies = checkpoints
    linked = [
        plan_variant(
            scan(donor, copy),
            donor,
            copy,
            policy=Policy.THRESHOLDS,
            fingerprints=Fingerprints("donor", copy.path.name),
        )
        for copy in copies
    ]
    return [plan_donor(donor, fingerprint="donor"), *linked]


def exhaust(admission: Generator[int, None, ResidentVariant]) -> None:
    for _ in admission:
        pass


def test_allocated_bytes_grow_by_the_unique_bytes_and_peak_low(
    large_family: list[Checkpoint],
) -> None:
    device = torch.device("cuda")
    pool = Pool(device=device)
    start = torch.cuda.memory_allocated()
    held = 0
    for number, (checkpoint, plan) in enumerate(
        zip(large_family, plans(large_family), strict=True)
    ):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        exhaust(pool.admit(checkpoint.path.name, checkpoint, plan, "base" if number else None))
        held += plan.unique_bytes
        grown = torch.cuda.memory_allocated() - start
        assert 0 <= grown - held <= ROUNDING_BYTES * len(checkpoint.tensors) * (number + 1)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= plan.unique_bytes + SLACK_BYTES
    for name in ("copy-0", "copy-1", "copy-2", "base"):
        pool.remove(name)
    assert torch.cuda.memory_allocated() == start


def test_greedy_tokens_of_a_mixed_batch_are_each_models_own(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "base")
    variant = make_variant(tmp_path / "far", donor, scale=0.5)
    engine = Engine(EngineConfig(device="cuda", kv_cache_tokens=1024))
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        report = scan(a, b)
        far = plan_variant(
            report, a, b, policy=Policy.EXACT, fingerprints=Fingerprints("base", "far")
        )
        for checkpoint, plan, lender in (
            (a, plan_donor(a, fingerprint="base"), None),
            (b, far, "base"),
        ):
            engine.handle(
                LoadModel(
                    model=checkpoint.path.name,
                    path=str(checkpoint.path),
                    identity=checkpoint.identity,
                    config=checkpoint.config,
                    plan=plan,
                    donor=lender,
                    max_model_len=None,
                )
            )
        loaded = 0
        while loaded < 2:
            for event in engine.step():
                assert not isinstance(event, LoadFailed), event
                loaded += isinstance(event, ModelLoaded)
    prompt = tuple(range(10, 40))
    for name in ("base", "far"):
        sampling = SamplingParams(max_tokens=12, temperature=0.0)
        engine.handle(Submit(request_id=name, model=name, prompt_ids=prompt, sampling=sampling))
    tokens: dict[str, list[int]] = {"base": [], "far": []}
    while engine.has_work:
        for event in engine.step():
            assert not isinstance(event, RequestFailed), event
            if isinstance(event, StepOutput):
                for token in event.tokens:
                    tokens[token.request_id].append(token.token_id)
    for path in (donor, variant):
        assert_near_greedy(path, prompt, tokens[path.name])


def assert_near_greedy(path: Path, prompt: tuple[int, ...], tokens: list[int]) -> None:
    """Every chosen token is the reference's best, or within bfloat16's rounding of it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cuda")
    ids = torch.tensor([[*prompt, *tokens]], device="cuda")
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens, device="cuda")]
    assert len(tokens) == 12
    assert (logits.max(dim=-1).values - chosen).max() < 0.02 * logits.abs().max()
