"""A tuner without tensors: it speaks the worker's protocol and knows every price beforehand.

It prices "identical bytes alone" and "all blocks", and answers given rungs with the latter's price.
What it was asked and told lies beside the variant's weights, and maybe a file of residual rungs, by
what a plan with every matrix on that rung costs: of those the dearest within the budget is chosen.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linker_core.errors import InvalidRequestError, LinkerError
from linker_core.sharing.plan import Fingerprints, Policy
from linker_core.sharing.planner import identical_rungs, plan_rungs
from linker_core.sharing.price import Price
from linker_core.sharing.report import ScanReport
from linker_core.sharing.rungs import ENCODING, AnyRung, Rung, parse_rung
from linker_core.tuning.request import TuneRequest
from linker_core.tuning.result import PricedPlan, TuneResult
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import parse_key
from server.onboarding.prepare import read_text_side
from server.onboarding.tuner import encode_text

FAKE_TUNER = (sys.executable, "-m", "tests.server.fake_tuner")
LOG, BLOCKER = "tunings.log", "tuner-waits"  # the second: a file that holds the tuner up
RUNGS = "rungs.of-the-tuner"  # JSON: KL -> rung
KL, KL_UPPER = 0.004, 0.006  # of all blocks
TOKENS = 4096


def main() -> None:
    request = TuneRequest.from_json(json.loads(sys.stdin.readline()))
    variant = Path(request.variant)
    with (variant / LOG).open("a") as log:
        asked = request.to_json()
        kept = {key: asked[key] for key in ("goal", "device", "matmul_precision")}
        log.write(json.dumps(kept) + "\n")
    emit({"stage": "tuning", "done_bytes": 1, "total_bytes": 2})
    while (variant / BLOCKER).exists():
        time.sleep(0.01)
    try:
        emit({"result": tune(request)})
    except LinkerError as error:
        emit({"error": error.to_record()})
        sys.exit(1)


def tune(request: TuneRequest) -> dict[str, Any]:
    if os.environ.get("LINKER_TEST_TUNER_FAILS"):
        raise InvalidRequestError("The text is of no use.", param="calibration")
    report = ScanReport.from_json(request.report)
    with Checkpoint.open(request.donor) as donor, Checkpoint.open(request.variant) as variant:
        exact = identical_rungs(report, donor, variant)

        def point(origin: str, rungs: Mapping[str, AnyRung], kl: float, upper: float) -> PricedPlan:
            size = plan_rungs(
                report, donor, variant, rungs,
                policy=Policy.BUDGET, fingerprints=Fingerprints("d", "v"),
            )  # fmt: skip
            price = Price(
                kl=kl, kl_upper=upper, top1=1 - kl, ppl_ratio=1 + kl, tokens=TOKENS,
                calibration="text", matmul_precision=request.matmul_precision, encoding=ENCODING,
            )  # fmt: skip
            return PricedPlan(origin=origin, rungs=rungs, rung_bytes=size.rung_bytes, price=price)

        unchanged = point("identical bytes alone", exact, 0.0, 0.0)
        if request.goal.rungs is not None:
            given = {name: parse_rung(rung) for name, rung in request.goal.rungs.items()}
            chosen = point("given", given, KL, KL_UPPER)
            points = [unchanged, chosen]
        else:
            blocks = {name: Rung.ALIAS if in_block(name) else rung for name, rung in exact.items()}
            shared = point("all blocks", blocks, KL, KL_UPPER)
            points = [unchanged, shared]
            budget = request.goal.budget_kl
            chosen = unchanged if budget is not None and budget < KL_UPPER else shared
            if residual := residual_rungs(Path(request.variant)):
                points = [
                    point(rung, on_rung(variant, parse_rung(rung)), kl, kl)
                    for kl, rung in sorted(residual.items())
                ]
                limit = float("inf") if budget is None else budget
                chosen = [plan for plan in points if plan.price.kl <= limit][-1]
        result = TuneResult(
            chosen=chosen,
            frontier=tuple(sorted(points, key=lambda plan: plan.unique_bytes)),
            reference_tokens=TOKENS, calibration=text_digest(request),
            forward_passes=2.0, seconds=0.5,
        )  # fmt: skip
        return {
            "tune": result.to_json(),
            "identity": variant.identity,
            "donor_identity": donor.identity,
        }


def residual_rungs(variant: Path) -> dict[float, str]:
    """Returns the residual rungs that there are to choose from, by what they cost."""
    file = variant / RUNGS
    record = json.loads(file.read_text()) if file.exists() else {}
    return {float(kl): rung for kl, rung in record.items()}


def on_rung(variant: Checkpoint, rung: AnyRung) -> dict[str, AnyRung]:
    """Returns a plan of every matrix on one rung; norms and biases are the variant's own."""
    return {
        name: rung if len(tensor.shape) == 2 else Rung.OWN
        for name, tensor in variant.tensors.items()
    }


def text_digest(request: TuneRequest) -> str:
    donor, variant = read_text_side(Path(request.donor)), read_text_side(Path(request.variant))
    text = encode_text(donor, variant, request.calibration, device=request.device)
    return text.digest or "of its own answers"


def in_block(name: str) -> bool:
    key = parse_key(name)
    return key is not None and key.layer is not None


def emit(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
