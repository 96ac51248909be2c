"""RELIABILITY, Methods 3: thousands of spoilt folders, each refused with a reason or read truly.

Every mutant is opened in a child process, whose death or silence counts as a failure. A failure
names its seed; the same seed makes the same mutant again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import from_record
from server.gateway.errors import error_response
from tests.linker_core.sharing.delta_edits import write_small
from tests.linker_core.weights.corruption import mutations
from tests.linker_core.weights.corruption.children import Child, ask_all
from tests.lora import make_adapter
from tests.tiny import make_checkpoint

NUM_MUTANTS = 2400  # of checkpoints
NUM_OTHERS = 400  # of adapters, and of deltas
SMALL = {"vocab_size": 300, "hidden": 16, "intermediate": 24}
KINDS = (  # of checkpoints
    {"shards": 2},
    {"shards": 2, "architecture": "llama", "dtype": "float32", "tie": False},
    {"shards": 3, "architecture": "gemma2", "dtype": "float16"},
    {"architecture": "qwen3"},
)


def refused(answers: list[dict[str, Any]], tasks: list[dict[str, Any]]) -> int:
    """Returns how many mutants were refused, each with a status that blames the client."""
    faults = [
        f"{task['kind']} {task['original']} seed {task['seed']} ({answer['how']}): "
        f"{answer['fault']}"
        for task, answer in zip(tasks, answers, strict=True)
        if answer["fault"] is not None
    ]
    assert not faults, f"{len(faults)} mutants\n" + "\n".join(faults[:5])
    errors = [from_record(answer["error"]) for answer in answers if answer["error"] is not None]
    statuses = Counter(error_response(error).status_code for error in errors)
    assert statuses.keys() == {400}, statuses
    return len(errors)


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Child]]:
    scratch = tmp_path_factory.mktemp("scratch")
    children = [Child(scratch / name, os.environ) for name in ("a", "b")]
    yield children
    for child in children:
        child.close()


def test_spoilt_checkpoint_is_read_truly_or_refused(tmp_path: Path, children: list[Child]) -> None:
    originals = [
        make_checkpoint(tmp_path / f"original-{number}", **SMALL, **kind)  # type: ignore[arg-type]
        for number, kind in enumerate(KINDS)
    ]
    tasks = [
        {"kind": "checkpoint", "original": str(originals[seed % len(originals)]), "seed": seed}
        for seed in range(NUM_MUTANTS)
    ]
    answers = ask_all(tasks, children)
    num_refused = refused(answers, tasks)
    assert NUM_MUTANTS // 2 < num_refused < NUM_MUTANTS  # both ways out are taken
    done = Counter(how for answer in answers for how in answer["how"].split(" + "))
    assert done.keys() == {kind.__name__ for kind in mutations.CHECKPOINT}


@pytest.mark.parametrize("kind", ["adapter", "delta"])
def test_spoilt_adapter_or_delta_is_read_truly_or_refused(
    tmp_path: Path, children: list[Child], kind: str
) -> None:
    if kind == "adapter":
        base = make_checkpoint(tmp_path / "base", **SMALL)  # type: ignore[arg-type]
        original = make_adapter(tmp_path / "original", base)
    else:
        original, base = write_small(tmp_path / "family"), tmp_path / "family" / "donor"
    tasks = [
        {"kind": kind, "original": str(original), "base": str(base), "seed": seed}
        for seed in range(NUM_OTHERS)
    ]
    num_refused = refused(ask_all(tasks, children), tasks)
    assert NUM_OTHERS // 2 < num_refused < NUM_OTHERS


def test_workers_death_is_seen_and_another_takes_its_place(
    tmp_path: Path, children: list[Child]
) -> None:
    original = make_checkpoint(tmp_path / "original", **SMALL)  # type: ignore[arg-type]
    honest = {"kind": "checkpoint", "original": str(original), "seed": 1}
    lost = {**honest, "original": str(tmp_path / "nowhere")}
    answers = ask_all([honest, lost, honest], children[:1])
    assert answers[0] == answers[2]
    assert answers[0]["fault"] is None
    assert answers[1]["fault"] == "died with 1"
