"""The engine by its messages: generating, loading, unloading, faults that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linker_core.engine.engine import MAX_CRASHED_STEPS, EngineBrokenError
from linker_core.engine.messages import (
    Abort,
    FinishReason,
    ModelLoaded,
    SamplingParams,
    Snapshot,
    Submit,
)
from linker_core.engine.runner import Chunk
from tests.linker_core.engine.driving import GREEDY, SMALL, Driver, load_message
from tests.linker_core.engine.families import (
    reference_greedy,
    reference_logprobs,
    reference_model,
)
from tests.linker_core.engine.serving import PROMPT, Served, serve_three
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant, save_state


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_greedy_alone_and_mixed_equals_transformers(
    tmp_path: Path, architecture: str
) -> None:
    served = serve_three(tmp_path, architecture)
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0)
    prompts = {name: [*PROMPT, number, 40 + number] * 4 for number, name in enumerate(served.paths)}
    alone = {}
    for name, prompt in prompts.items():
        alone[name] = served.driver.submit(name, prompt, params)
        served.driver.run()
    mixed = {name: served.driver.submit(name, prompt, params) for name, prompt in prompts.items()}
    served.driver.run()
    for name, prompt in prompts.items():
        model = served.references[name]
        want = reference_greedy(model, prompt, 12)
        # Tokens alone could not tell two variants apart that repeat the same one.
        logprobs = reference_logprobs(model, prompt, want)
        for request_id in (alone[name], mixed[name]):
            assert served.driver.tokens(request_id) == want
            assert served.driver.reason(request_id) is FinishReason.LENGTH
            got = [token.logprob for token in served.driver.outputs[request_id]]
            assert got == pytest.approx(logprobs, abs=1e-3)
    assert len({round(served.driver.outputs[r][0].logprob or 0, 3) for r in alone.values()}) == 3


def test_engine_preemption_gives_the_same_tokens(tmp_path: Path) -> None:
    # Four sequences of 28 tokens at the end in 17 pages of 4 tokens: they cannot all stay.
    config = replace(SMALL, kv_cache_tokens=68)
    served = serve_three(tmp_path, "qwen2", config)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    prompts = [[*PROMPT, number] for number in range(4)]
    want = [reference_greedy(served.references["own"], prompt, 20) for prompt in prompts]
    ids = [served.driver.submit("own", prompt, params) for prompt in prompts]
    served.driver.run()
    scheduler = served.driver.engine.residents.families["base"].scheduler
    assert scheduler.num_preemptions > 0
    assert [served.driver.tokens(request_id) for request_id in ids] == want
    assert scheduler.cache.num_used_pages == 0


def test_engine_seed_gives_the_same_tokens_whoever_else_is_in_the_batch(served: Served) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.5, seed=7)
    alone = served.driver.generate("half", PROMPT, params)
    assert served.driver.generate("half", PROMPT, params) == alone
    others = [
        served.driver.submit(name, [number, *PROMPT], replace(params, seed=None))
        for number, name in enumerate(("base", "own", "half", "base"))
    ]
    again = served.driver.submit("half", PROMPT, params)
    served.driver.run()
    assert served.driver.tokens(again) == alone
    assert all(len(served.driver.tokens(other)) == 16 for other in others)
    different = served.driver.generate("half", PROMPT, replace(params, seed=8))
    assert different != alone


def test_engine_stop_token_ends_the_sequence_and_is_reported(served: Served) -> None:
    free = served.driver.generate("base", PROMPT)
    stop = frozenset({free[3]})
    assert free.index(free[3]) == 3
    request_id = served.driver.submit("base", PROMPT, replace(GREEDY, stop_token_ids=stop))
    served.driver.run()
    assert served.driver.tokens(request_id) == free[:4]
    assert served.driver.reason(request_id) is FinishReason.STOP


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_engine_abort_frees_pages_in_any_state(served: Served, steps: int) -> None:
    family = served.driver.engine.residents.families["base"]
    aborted = served.driver.submit("own", PROMPT * 6, replace(GREEDY, max_tokens=30))
    other = served.driver.submit("base", PROMPT)
    for _ in range(steps):
        served.driver.step()
    served.driver.engine.handle(Abort(request_id=aborted))
    served.driver.engine.handle(Abort(request_id="never heard of"))
    seen = len(served.driver.outputs[aborted])
    served.driver.run()
    assert len(served.driver.outputs[aborted]) == seen
    want = reference_greedy(served.references["base"], PROMPT, GREEDY.max_tokens)
    assert served.driver.tokens(other) == want
    assert family.cache.num_used_pages == 0


def assert_refused(driver: Driver, request_id: str, code: str) -> str:
    driver.run()
    error = driver.errors[request_id]
    assert error["code"] == code
    assert not driver.outputs[request_id]
    return error["message"] or ""


def test_engine_submit_for_an_unknown_model_is_refused(served: Served) -> None:
    assert_refused(served.driver, served.driver.submit("nobody", PROMPT), "model_not_found")


def test_engine_submit_beyond_the_context_is_refused(served: Served) -> None:
    params = replace(GREEDY, max_tokens=250)
    message = assert_refused(
        served.driver, served.driver.submit("base", PROMPT, params), "context_length_exceeded"
    )
    assert "This model's maximum context length is 256 tokens" in message
    assert "context_length_exceeded" in message
    assert len(served.driver.generate("base", PROMPT, replace(GREEDY, max_tokens=249))) == 249


@pytest.mark.parametrize(
    ("model", "prompt", "bias"),
    [
        ("base", [], {}),
        ("base", [512], {}),
        ("base", [-1], {}),
        ("own", [514], {}),
        ("base", [1], {512: 1.0}),
    ],
)
def test_engine_submit_outside_the_variants_vocabulary_is_refused(
    served: Served, model: str, prompt: list[int], bias: dict[int, float]
) -> None:
    params = replace(GREEDY, logit_bias=bias)
    request_id = served.driver.submit(model, prompt, params)
    assert_refused(served.driver, request_id, "invalid_request_error")


def test_engine_added_tokens_can_be_prompted_and_chosen(served: Served) -> None:
    params = replace(GREEDY, max_tokens=2, logit_bias={513: 1000.0})
    assert served.driver.generate("own", [512, 513], params) == [513, 513]


def test_engine_a_model_with_a_nan_weight_fails_the_requests_that_meet_it_alone(
    served: Served, tmp_path: Path
) -> None:
    state = load_file(served.paths["own"] / "model.safetensors")
    state["model.embed_tokens.weight"][PROMPT[3], 4] = float("nan")
    broken = make_variant(tmp_path / "broken", served.paths["base"], scale=0.1)
    record = (served.paths["own"] / "config.json").read_text()
    (broken / "config.json").write_text(record)
    save_state(broken, state)
    loaded = served.driver.load(load_message("broken", broken, donor="base"))
    assert isinstance(loaded, ModelLoaded)
    bad = served.driver.submit("broken", PROMPT)
    good = served.driver.submit("own", PROMPT)
    served.driver.run()
    assert served.driver.errors[bad]["code"] == "numerical_error"
    want = reference_greedy(served.references["own"], PROMPT, GREEDY.max_tokens)
    assert served.driver.tokens(good) == want
    assert served.driver.engine.residents.families["base"].cache.num_used_pages == 0


def test_engine_a_failing_forward_fails_its_batch_and_goes_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = served.driver.engine.residents.families["base"].runner
    forward = runner.forward

    def broken(_: Sequence[Chunk]) -> torch.Tensor:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(runner, "forward", broken)
    failing = [served.driver.submit(name, PROMPT) for name in ("base", "own")]
    served.driver.run()
    assert [served.driver.errors[i]["code"] for i in failing] == ["engine_failure"] * 2
    monkeypatch.setattr(runner, "forward", forward)
    want = reference_greedy(served.references["own"], PROMPT, GREEDY.max_tokens)
    assert served.driver.generate("own", PROMPT) == want


def test_engine_forwards_that_keep_failing_end_the_engine(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = served.driver.engine.residents.families["base"].runner

    def broken(_: Sequence[Chunk]) -> torch.Tensor:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(runner, "forward", broken)
    for _ in range(MAX_CRASHED_STEPS - 1):
        served.driver.submit("base", PROMPT)
        served.driver.run()
    served.driver.submit("base", PROMPT)
    with pytest.raises(EngineBrokenError):
        served.driver.run()


def test_engine_two_families_are_served_side_by_side(served: Served, tmp_path: Path) -> None:
    driver = served.driver
    other = make_checkpoint(tmp_path / "other", architecture="llama", layers=3, seed=4)
    assert isinstance(driver.load(load_message("llama", other)), ModelLoaded)
    ids = [driver.submit("llama", PROMPT), driver.submit("half", PROMPT)]
    driver.run()
    wants = [
        reference_greedy(model, PROMPT, GREEDY.max_tokens)
        for model in (reference_model(other), served.references["half"])
    ]
    assert [driver.tokens(request_id) for request_id in ids] == wants


def test_engine_snapshots_count_running_and_waiting_at_most_twice_a_second(
    tmp_path: Path,
) -> None:
    base = make_checkpoint(tmp_path / "base")
    driver = Driver(replace(SMALL, max_num_seqs=1))
    now = [0.0]
    driver.engine._clock = lambda: now[0]
    driver.engine._snapshot_due_s = 0.0
    driver.load(load_message("base", base))
    ids = [driver.submit("base", PROMPT, replace(GREEDY, max_tokens=100)) for _ in range(3)]
    before = len(driver.events)
    for _ in range(10):
        driver.step()
        now[0] += 0.1
    snapshots = [event for event in driver.events[before:] if isinstance(event, Snapshot)]
    assert 1 <= len(snapshots) <= 2
    load = snapshots[-1].load["base"]
    assert (load.running, load.waiting) == (1, 2)
    for request_id in ids:
        driver.engine.handle(Abort(request_id=request_id))


def test_engine_gives_up_a_sequence_that_no_step_takes_in_time(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    driver = Driver(replace(SMALL, max_num_seqs=1))
    now = [0.0]
    driver.engine._clock = lambda: now[0]
    driver.load(load_message("base", base))

    def submit(request_id: str, within_s: float | None, submitted_s: float | None = None) -> None:
        params = replace(GREEDY, max_tokens=40)
        driver.engine.handle(
            Submit(
                request_id=request_id,
                model="base",
                prompt_ids=tuple(PROMPT),
                sampling=params,
                start_within_s=within_s,
                submitted_s=submitted_s,
            )
        )

    submit("first", 1.0)
    driver.step()
    submit("late", 1.0)
    submit("gone", 1.0)
    submit("patient", None)
    driver.engine.handle(Abort(request_id="gone"))
    now[0] = 0.9
    driver.step()
    assert not driver.errors
    submit("read late", 1.0, submitted_s=0.0)  # while a step was running
    now[0] = 1.0
    driver.step()
    assert {name: error["code"] for name, error in driver.errors.items()} == {
        "late": "deadline_exceeded",
        "read late": "deadline_exceeded",
    }
    driver.run()
    assert len(driver.tokens("first")) == len(driver.tokens("patient")) == 40
    assert not driver.outputs["late"]
