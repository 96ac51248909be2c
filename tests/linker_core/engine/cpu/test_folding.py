from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from llvmlite import ir

from linker_core.engine.cpu.emitter import F32, POINTER, Emitter, vector
from linker_core.engine.cpu.folding import folded, sums
from tests.linker_core.engine.cpu.compiled import compiled, record, run

_TASK = ("vectors", "sums", "maxima")
Floats = npt.NDArray[np.float32]


def _fold(vectors: Floats) -> tuple[Floats, Floats]:
    """Returns the sum and the largest lane of each vector, folded together."""
    count, lanes = vectors.shape

    def emit(module: ir.Module) -> None:
        e = Emitter(module, "fold", [POINTER])
        (task,) = e.arguments
        source, totals, maxima = (e.field(task, number, POINTER) for number in range(3))
        loaded = [e.load(e.at(source, i * lanes, F32), vector(F32, lanes)) for i in range(count)]
        for number, total in enumerate(sums(e, loaded)):
            e.store(total, e.at(totals, number, F32))
        largest = folded(e, loaded, e.maximum)
        for number in range(count):
            e.store(e.lane(largest, number), e.at(maxima, number, F32))
        e.finish()

    found = np.zeros((2, count), dtype=np.float32)
    addresses = {"sums": found[0].ctypes.data, "maxima": found[1].ctypes.data}
    run(compiled(emit), "fold", record(_TASK, vectors=vectors.ctypes.data, **addresses))
    return found[0], found[1]


def _halved(vectors: Floats) -> Floats:
    while vectors.shape[1] > 1:
        half = vectors.shape[1] // 2
        vectors = vectors[:, :half] + vectors[:, half:]
    return vectors[:, 0]


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 20])
def test_vectors_folded_together_are_folded_as_each_alone(count: int, lanes: int) -> None:
    generator = np.random.default_rng(count)
    vectors = generator.standard_normal((count, lanes)).astype(np.float32)
    sums, maxima = _fold(vectors)
    assert np.array_equal(sums, _halved(vectors))
    assert np.array_equal(maxima, vectors.max(axis=1))
