"""Principal components of a family in two ways: `python -m … gram_ways WAY GLOB BASE VARIANT …`.

A process of its own, so that its memory is that of one way alone. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.selection import select
from analysis.tensors import read_tensor


def main() -> None:
    """Computes, and says how long it took and what came out."""
    way, glob, base, *variants = sys.argv[1:]
    named = {str(number): Path(path) for number, path in enumerate(variants)}
    with StudiedFamily.open(Path(base), named) as family:
        names = select(family.base, [glob])
        started, cpu_started = time.perf_counter(), time.process_time()
        shares = {"streamed": streamed, "stacked": stacked}[way](family, names)
        seconds = time.perf_counter() - started
        cpu_seconds = time.process_time() - cpu_started
        nbytes = sum(c.tensors[name].nbytes for c in family.checkpoints for name in names)
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": nbytes, "shares": shares}
    print(json.dumps(found))


def streamed(family: StudiedFamily, names: Sequence[str]) -> list[float]:
    """Returns PC1's share of each tensor, uncentred, from Gram matrices."""
    shares = []
    for gram in gram_pass(family, names, mapped=True):
        values_N = np.linalg.eigvalsh(gram.gram_NN)
        shares.append(float(values_N[-1] / values_N.sum()))
    return shares


def stacked(family: StudiedFamily, names: Sequence[str]) -> list[float]:
    """Returns the same as one would write it first: the deltas of a tensor stacked, and an SVD."""
    shares = []
    for name in names:
        base_D = read_tensor(family.base, name).ravel().astype(np.float64)
        deltas_ND = np.stack([
            read_tensor(variant, name).ravel() - base_D for variant in family.variants.values()
        ])  # fmt: skip
        _left, values_N, _right = np.linalg.svd(deltas_ND, full_matrices=False)
        shares.append(float(values_N[0] ** 2 / (values_N**2).sum()))
    return shares


if __name__ == "__main__":
    main()
