"""Seconds of encoding a variant's matrices on one rung, beside loading it with transformers.

Both read checkpoints from the page cache: encoding the donor's and the variant's, tensor by
tensor; transformers the variant's, into float32.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.loader import read_tensor
from linker_core.residency.stored import StoredTensor
from linker_core.sharing.rungs import Residual, parse_rung
from linker_core.weights.checkpoint import Checkpoint
from server.cli.bench.admission import copy_bytes, load_plainly, touch_free_memory
from server.cli.bench.pair import HALF_BILLION

SHAPE: Final = HALF_BILLION
RUNGS: Final = ("int4:64", "int2:64", "signs:64", "rank8:8", "rank8:8+signs:64", "rank32:4")
_CPU = torch.device("cpu")


def measure(donor: Path, variant: Path, *, rounds: int = 3) -> dict[str, Any]:
    """Loads and encodes in turn; medians of the rounds, ratios within this run.

    Args:
        donor: A checkpoint.
        variant: Another of the same family.
        rounds: How often each is done.
    """
    plain: list[float] = []
    encoded: dict[str, list[float]] = {text: [] for text in RUNGS}
    stored_bytes: dict[str, int] = {}
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        names = [name for name, tensor in b.tensors.items() if len(tensor.shape) == 2]
        weights = sum(math.prod(b.tensors[name].shape) for name in names)
        for _ in range(rounds):
            touch_free_memory(copy_bytes(variant))
            plain.append(load_plainly(variant))
            for text, seconds in encoded.items():
                started = time.perf_counter()
                stored_bytes[text] = _encode(a, b, names, text)
                seconds.append(time.perf_counter() - started)
    from_pretrained = median(plain)
    return {
        "num_cores": len(os.sched_getaffinity(0)),
        "from_pretrained_seconds": from_pretrained,
        "rungs": {
            text: {
                "bits_per_weight": 8 * stored_bytes[text] / weights,
                "seconds": median(seconds),
                "over_from_pretrained": median(seconds) / from_pretrained,
            }
            for text, seconds in encoded.items()
        },
    }


def _encode(donor: Checkpoint, variant: Checkpoint, names: list[str], text: str) -> int:
    """Encodes matrices one after another; returns the bytes of all."""
    rung = parse_rung(text)
    assert isinstance(rung, Residual)
    nbytes = 0
    for name in names:
        base = StoredTensor(tensor=read_tensor(donor, name, device=_CPU))
        nbytes += DeltaEncoder(base, read_tensor(variant, name, device=_CPU)).encode(rung).nbytes
    return nbytes
