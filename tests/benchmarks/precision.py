"""How far `matmul_precision: medium` takes models from their own answers, with nothing shared.

`python -m tests.benchmarks.precision FAMILY` prints the table of docs/fidelity.md. FAMILY is a
folder of checkpoints.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from linker_core.config import MatmulPrecision
from linker_core.engine.cpu.kernels import can_round
from linker_core.pace import Pace
from linker_core.sharing.rungs import Rung
from linker_core.tuning.calibration import CalibrationText
from linker_core.tuning.shared_walk import LastHidden, SharedWalk
from linker_core.tuning.storages import SectionReader
from linker_core.tuning.texts import calibration_text
from linker_core.tuning.walk import Walk
from linker_core.weights.checkpoint import Checkpoint

_CPU = torch.device("cpu")


class Moved(NamedTuple):
    """What medium changes of a model's next-token distributions."""

    kl: float  # mean KL(highest ‖ medium), nats per response token
    kl_worst: float  # of a token
    top1: float  # share of tokens on which both prefer the same
    num_tokens: int


def measure(path: Path) -> Moved:
    """Compares a model with itself on the response tokens of the shipped dialogues."""
    with Checkpoint.open(path) as model:
        text = calibration_text(model, None, device="cpu", pace=Pace(), precision="highest")
        highest, own = _walked(model, text, "highest")
        medium, moved = _walked(model, text, "medium")
        parts = []
        for rows in highest.chunks():
            own_nV, moved_nV = (
                walk.log_probs(last, rows).double()
                for walk, last in ((highest, own), (medium, moved))
            )
            kl_n = (own_nV.exp() * (own_nV - moved_nV)).sum(dim=-1)
            agrees_n = own_nV.argmax(dim=-1) == moved_nV.argmax(dim=-1)
            parts.append(torch.stack([kl_n, agrees_n.double()]))
    kl_R, agrees_R = torch.cat(parts, dim=1)
    return Moved(
        kl=float(kl_R.mean()),
        kl_worst=float(kl_R.max()),
        top1=float(agrees_R.mean()),
        num_tokens=len(kl_R),
    )


def _walked(
    model: Checkpoint, text: CalibrationText, precision: MatmulPrecision
) -> tuple[SharedWalk, LastHidden]:
    """Takes the text through all blocks of a model that shares nothing."""
    lengths = [len(sequence.token_ids) for sequence in text.sequences]
    reader = SectionReader(
        model, model, identical=frozenset(), device=_CPU, on_read=lambda _nbytes: None
    )
    shared = SharedWalk(
        Walk(model.config, lengths, device=_CPU, pace=Pace(), precision=precision),
        reader,
        [token for sequence in text.sequences for token in sequence.token_ids],
        _predicting_rows(text),
    )
    (last,) = shared.last_hidden([dict.fromkeys(model.tensors, Rung.OWN)])
    return shared, last


def _predicting_rows(text: CalibrationText) -> list[int]:
    """Returns the rows whose logits predict a response token."""
    rows: list[int] = []
    first = 0
    for sequence in text.sequences:
        rows += [first + position - 1 for span in sequence.responses for position in span]
        first += len(sequence.token_ids)
    return rows


def main() -> None:
    """Measures every model of a family."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("family", type=Path)
    folders = sorted(path.parent for path in parser.parse_args().family.glob("*/config.json"))
    if not can_round():
        print("This CPU has no AVX512_BF16: medium is highest here.")
    print("| model | KL(highest ‖ medium) | worst token | top-1 | tokens |")
    print("|---|---|---|---|---|")
    for folder in folders:
        moved = measure(folder)
        print(
            f"| {folder.name} | {moved.kl:.2e} | {moved.kl_worst:.2e} | {moved.top1:.4f} "
            f"| {moved.num_tokens:,} |"
        )


if __name__ == "__main__":
    main()
