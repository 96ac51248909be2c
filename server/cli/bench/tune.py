"""What tuning costs, in forward passes of the variant over the same text by the same code."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from linker_core.pace import Pace
from linker_core.sharing.planner import identical_rungs
from linker_core.sharing.report import ScanReport
from linker_core.sharing.rungs import Rung
from linker_core.sharing.scan import scan
from linker_core.tuning.calibration import CalibrationText
from linker_core.tuning.memory import tuning_bytes
from linker_core.tuning.pricing import Pricer
from linker_core.tuning.request import DEFAULT_BUDGET_KL, TuneGoal, TuneRequest
from linker_core.tuning.sensitivity import measure_sensitivities
from linker_core.tuning.shared_walk import SharedWalk
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.texts import calibration_text
from linker_core.tuning.tuner import tune
from linker_core.tuning.walk import Walk
from linker_core.weights.checkpoint import Checkpoint
from server.cli.bench.memory import private_bytes
from server.cli.bench.pair import SMALL

SHAPE: Final = SMALL
_NUM_PLANS: Final = 6
_CPU: Final = torch.device("cpu")
_SAMPLE_S: Final = 0.01


def measure(donor: Path, variant: Path, *, rounds: int = 3) -> dict[str, Any]:
    """Times the tuner's parts in turn; the best of the rounds counts.

    Args:
        donor: A checkpoint with a tokenizer.
        variant: Another of the same family.
        rounds: How often each part is done.
    """
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        report = scan(a, b)
        return _Bench(a, b, report).measure(rounds)


class _Bench:
    """One pair, its text, and what has been timed."""

    def __init__(self, donor: Checkpoint, variant: Checkpoint, report: ScanReport) -> None:
        self._donor, self._variant, self._report = donor, variant, report
        self._own = identical_rungs(report, donor, variant)
        self._text = calibration_text(variant, None, device="cpu", pace=Pace(), precision="highest")
        self._seconds: dict[str, list[float]] = {}
        self._read_bytes = 0

    def measure(self, rounds: int) -> dict[str, Any]:
        plans = self._unrelated_plans()
        peak_bytes = 0
        for _ in range(rounds):
            self._timed("forward", self._forward)
            self._timed("sensitivities", self._measure_sensitivities)
            self._read_bytes = 0
            with _private_peak() as peak:
                self._timed("prices", lambda: self._pricer(self._text).price(plans))
            peak_bytes = max(peak_bytes, peak())
        self._timed("tune", self._tune)
        best = {what: min(times) for what, times in self._seconds.items()}
        num_tokens = sum(len(sequence.token_ids) for sequence in self._text.sequences)
        allowed = tuning_bytes(
            self._donor.config,
            self._variant.config,
            num_tokens=num_tokens,
            num_plans=len(plans),
            device="cpu",
        )
        passes = {what: seconds / best["forward"] for what, seconds in best.items()}
        return {
            "response_tokens": self._text.num_response_tokens,
            "tokens": num_tokens,
            "forward_seconds": best["forward"],
            "sensitivities_passes": passes["sensitivities"],
            "prices_num_plans": len(plans),
            "prices_passes_per_plan_and_reference": passes["prices"] / (len(plans) + 1),
            "prices_reads_of_both_checkpoints": self._read_bytes
            / (self._donor.nbytes + self._variant.nbytes),
            "prices_peak_private_mib": peak_bytes / 2**20,
            "prices_reserved_mib": allowed / 2**20,
            "tune_passes": passes["tune"],
        }

    def _unrelated_plans(self) -> list[Rungs]:
        """Returns plans that part in the first block, so that nothing but reads is shared."""
        matrices = [n for n, tensor in self._variant.tensors.items() if len(tensor.shape) == 2]
        first = [name for name in matrices if name.startswith("model.layers.0.")]
        rest = [name for name in matrices if name.startswith("model.layers.")]
        return [
            {
                **self._own,
                **dict.fromkeys(rest[number::_NUM_PLANS], Rung.ALIAS),
                name: Rung.ALIAS,
            }
            for number, name in enumerate(first[:_NUM_PLANS])
        ]

    def _forward(self) -> None:
        """Takes the variant itself through the same code, up to its logits."""
        token_ids, predicting = self._token_ids(), range(self._text.num_response_tokens)
        shared = SharedWalk(self._walk(), self._reader(), token_ids, predicting)
        (last,) = shared.last_hidden([self._own])
        for rows in shared.chunks():
            shared.logits(last, rows)

    def _token_ids(self) -> list[int]:
        return [token for s in self._text.sequences for token in s.token_ids]

    def _pricer(self, text: CalibrationText) -> Pricer:
        return Pricer(self._walk(), self._reader(), self._own, text)

    def _walk(self) -> Walk:
        lengths = [len(sequence.token_ids) for sequence in self._text.sequences]
        return Walk(self._variant.config, lengths, device=_CPU, pace=Pace(), precision="highest")

    def _reader(self) -> SectionReader:
        return SectionReader(
            self._donor, self._variant, identical=frozenset(), device=_CPU, on_read=self._count
        )

    def _count(self, nbytes: int) -> None:
        self._read_bytes += nbytes

    def _measure_sensitivities(self) -> None:
        measure_sensitivities(self._walk(), self._reader(), self._own, self._token_ids())

    def _tune(self) -> None:
        tune(
            TuneRequest(
                donor=str(self._donor.path),
                variant=str(self._variant.path),
                report=self._report.to_json(),
                donor_fingerprint="",
                goal=TuneGoal(budget_kl=DEFAULT_BUDGET_KL),
            )
        )

    def _timed(self, what: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        self._seconds.setdefault(what, []).append(time.perf_counter() - started)


@contextmanager
def _private_peak() -> Iterator[Callable[[], int]]:
    """Samples this process's private bytes; yields what tells the most above the start."""
    pid, stop = os.getpid(), threading.Event()
    start, peak = private_bytes(pid), 0

    def sample() -> None:
        nonlocal peak
        while not stop.wait(_SAMPLE_S):
            peak = max(peak, private_bytes(pid) - start)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        stop.set()
        thread.join()
