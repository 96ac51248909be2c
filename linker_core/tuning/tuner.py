"""Budget -> plan: measure what each swap does, price candidates, choose (DESIGN's single pass).

Runs in a process of its own. The bytes it holds are those of `tuning.memory`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from linker_core.errors import InvalidRequestError
from linker_core.pace import Pace
from linker_core.sharing.plan import count_weights, plan_bytes
from linker_core.sharing.planner import count_own_rows, identical_rungs
from linker_core.sharing.price import Price
from linker_core.sharing.report import ScanReport
from linker_core.sharing.rungs import ENCODING, Residual, Rung, parse_rung
from linker_core.sharing.thresholds import choose_thresholds
from linker_core.tuning.calibration import MIN_RESPONSE_TOKENS, CalibrationText
from linker_core.tuning.candidates import Candidate, Candidates
from linker_core.tuning.pricing import Pricer
from linker_core.tuning.request import TuneRequest
from linker_core.tuning.result import PricedPlan, TuneResult
from linker_core.tuning.search import Search
from linker_core.tuning.sensitivity import measure_sensitivities
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.texts import calibration_text
from linker_core.tuning.walk import Walk
from linker_core.weights.checkpoint import Checkpoint

UNCHANGED = "identical bytes alone"
_NUM_READS = 5  # of both checkpoints: sensitivities and four rounds of prices
_SAMPLED = 6  # one in so many sequences tells sensitivities: about 0.4 of a forward pass

Progress = Callable[[int, int], None]  # bytes read, bytes to read


def tune(
    request: TuneRequest, *, progress: Progress | None = None, pace: Pace | None = None
) -> TuneResult:
    """Prices plans of a pair and chooses one.

    Args:
        request: Which pair, towards what, on which text.
        progress: Called with bytes read and (about) all bytes to read.
        pace: Slows the work down while sequences run.

    Raises:
        BadCheckpointError: A checkpoint is damaged or changed.
        InvalidRequestError: A goal that cannot be reached, or a calibration text of no use.
    """
    with ExitStack() as stack:
        donor = stack.enter_context(Checkpoint.open(Path(request.donor)))
        variant = stack.enter_context(Checkpoint.open(Path(request.variant)))
        return Tuner(request, donor, variant, progress=progress, pace=pace or Pace()).run()


class Tuner:
    """One run of the tuner over two open checkpoints."""

    def __init__(
        self,
        request: TuneRequest,
        donor: Checkpoint,
        variant: Checkpoint,
        *,
        progress: Progress | None,
        pace: Pace,
    ) -> None:
        request.goal.check()
        if request.device == "cuda" and not torch.cuda.is_available():
            raise InvalidRequestError(
                "This installation of torch sees no CUDA device. Tune on the cpu.", param="device"
            )
        self._started = time.monotonic()
        self._goal = request.goal
        self._donor_fingerprint = request.donor_fingerprint
        self._donor, self._variant = donor, variant
        self._report = ScanReport.from_json(request.report)
        self._device = torch.device(request.device)
        self._precision = request.matmul_precision
        self._pace = pace
        self._base = identical_rungs(self._report, donor, variant)
        self._text = calibration_text(
            variant,
            request.calibration,
            device=request.device,
            pace=pace,
            precision=self._precision,
        )
        self._meter = _Meter(_NUM_READS * (donor.nbytes + variant.nbytes), progress)
        self._reader = SectionReader(
            donor,
            variant,
            identical=frozenset(n for n, rung in self._base.items() if rung is Rung.ALIAS),
            device=self._device,
            on_read=self._note_read,
        )
        self._pricer = Pricer(self._walk(self._text), self._reader, self._base, self._text)
        unchanged = PricedPlan(
            origin=UNCHANGED,
            rungs=self._base,
            rung_bytes=self._rung_bytes(self._base),
            price=self._unchanged(),
        )
        self._search = Search(unchanged, self._pricer, self._rung_bytes)

    def run(self) -> TuneResult:
        """Returns every plan that was priced, and the choice.

        Raises:
            InvalidRequestError: Nothing is as small as asked for, or given rungs that do not fit
                the pair.
        """
        if self._goal.rungs is not None:
            rungs = self._given_rungs(self._goal.rungs)
            self._search.price([Candidate(origin="given", rungs=rungs)])
            return self._result(self._search.priced[-1])
        if self._goal.budget_kl == 0.0:
            return self._result(self._search.priced[0])
        candidates = self._candidates()
        if self._goal.num_points is not None:
            num_weights = count_weights(self._variant)
            return self._result(self._search.spread(candidates, self._goal.num_points, num_weights))
        thresholds = choose_thresholds(self._report, donor_fingerprint=self._donor_fingerprint)
        if self._goal.max_bytes is not None:
            return self._result(
                self._search.within_bytes(candidates, thresholds, self._goal.max_bytes)
            )
        assert self._goal.budget_kl is not None
        if self._text.num_response_tokens < MIN_RESPONSE_TOKENS:
            raise InvalidRequestError(
                f"The calibration text has {self._text.num_response_tokens} response tokens for "
                f"this model; a budget is held against {MIN_RESPONSE_TOKENS} or more. Add text.",
                param="calibration",
            )
        return self._result(
            self._search.within_budget(candidates, thresholds, self._goal.budget_kl)
        )

    def _given_rungs(self, names: Mapping[str, str]) -> Rungs:
        rungs = {name: parse_rung(rung) for name, rung in names.items()}
        if rungs.keys() != self._variant.tensors.keys():
            raise InvalidRequestError("rungs must name every tensor of the variant.", param="rungs")
        for name, rung in rungs.items():
            if rung is Rung.ALIAS and not self._reader.can_alias(name):
                raise InvalidRequestError(f"The donor has no {name} to alias.", param="rungs")
            if isinstance(rung, Residual) and not self._reader.can_lean(name):
                raise InvalidRequestError(
                    f"The donor has no matrix {name} that {rung} could be a delta to.",
                    param="rungs",
                )
        return rungs

    def _candidates(self) -> Candidates:
        sequences = self._text.sequences[::_SAMPLED]
        walk = self._walk(self._text, every=_SAMPLED)
        token_ids = [token for sequence in sequences for token in sequence.token_ids]
        return Candidates(
            base=self._base,
            report=self._report,
            donor=self._donor,
            variant=self._variant,
            sensitivities=measure_sensitivities(walk, self._reader, self._base, token_ids),
        )

    def _note_read(self, nbytes: int) -> None:
        self._meter.add(nbytes)
        self._pace.after_read(nbytes)

    def _rung_bytes(self, rungs: Rungs) -> dict[str, int]:
        own_rows = count_own_rows(self._report, self._variant, rungs)
        return plan_bytes(rungs, own_rows, donor=self._donor, variant=self._variant).rung_bytes

    def _unchanged(self) -> Price:
        """Returns the price of a plan that changes no bit, which needs no measuring."""
        return Price(
            kl=0.0,
            kl_upper=0.0,
            top1=1.0,
            ppl_ratio=1.0,
            tokens=self._text.num_response_tokens,
            calibration=self._text.digest,
            matmul_precision=self._precision,
            encoding=ENCODING,
        )

    def _walk(self, text: CalibrationText, *, every: int = 1) -> Walk:
        lengths = [len(sequence.token_ids) for sequence in text.sequences[::every]]
        return Walk(
            self._variant.config,
            lengths,
            device=self._device,
            pace=self._pace,
            precision=self._precision,
        )

    def _result(self, chosen: PricedPlan) -> TuneResult:
        self._meter.finish()
        return TuneResult(
            chosen=chosen,
            frontier=tuple(sorted(self._search.priced, key=lambda plan: plan.unique_bytes)),
            reference_tokens=self._text.num_response_tokens,
            calibration=self._text.digest,
            forward_passes=self._pricer.forward_passes,
            seconds=time.monotonic() - self._started,
        )


class _Meter:
    """Adds up bytes read against an estimate of all there will be."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, nbytes: int) -> None:
        self._done = min(self._done + nbytes, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        self.add(self._total)
