"""Goes over tensors of several checkpoints on all cores and adds up their products, run by run.

Host memory is one piece a thread, or none where files are mapped, and the sums of the tensors that
are under way. A run is always summed by one thread, from its first element to its last, so results
are the same bit for bit whatever the number of threads.

Legend: M models, the base first; C runs of elements; P products of a tile.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from analysis.gram_kernel import Tile, TileLoop, tile_loop, tiles
from linker_core.pace import Pace
from linker_core.sharing.memory import MappedFiles, Memory, ReadBuffer
from linker_core.sharing.sweep import Meter, Progress
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.safetensors_header import FLOATS

MAX_RUNS = 64
LEAST_RUN = 256  # elements; shorter runs would tell little, and cost more
_RUN_STEP = 64  # whole vectors of every width
_PIECE_BYTES = 4 << 20  # of all models together; what is worth a call, and a thread's buffers
_SHARE_BYTES = 16 << 20  # what one thread takes at a time, if runs are shorter
_TENSORS_AHEAD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Products of one tensor. Values: 0 is W_B, i > 0 is the delta of the i-th fine-tune."""

    name: str
    products_CMM: npt.NDArray[np.float64]  # symmetric


def run_elements(count: int) -> int:
    """Returns how long the runs of a tensor are; only its last may be shorter."""
    num_runs = max(1, min(MAX_RUNS, count // LEAST_RUN))
    return -(-count // (num_runs * _RUN_STEP)) * _RUN_STEP


def sweep_tensors(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    *,
    mapped: bool,
    pace: Pace,
    progress: Progress | None,
) -> Iterator[Sums]:
    """Yields each tensor's sums in order; a few tensors ahead are worked on meanwhile.

    Args:
        checkpoints: The base, then its fine-tunes; each has every tensor in the base's shape.
        names: Of tensors.
        mapped: Read the files through maps: a file that is cut short then ends this process.
        pace: Holds back while sequences run.
        progress: Called from several threads with bytes read and bytes to read.

    Raises:
        BadCheckpointError: A file changed.
    """
    total = sum(checkpoint.tensors[name].nbytes for checkpoint in checkpoints for name in names)
    sweeper = _Sweeper(checkpoints, mapped=mapped, pace=pace, meter=Meter(total, progress))
    waiting = iter(names)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            under_way = deque(
                _start(sweeper, pool, name) for name in islice(waiting, _TENSORS_AHEAD)
            )
            while under_way:
                tensor, shares = under_way.popleft()
                for share in shares:
                    share.result()
                yield tensor.sums()
                under_way += [_start(sweeper, pool, name) for name in islice(waiting, 1)]
        finally:
            sweeper.stop()
            pool.shutdown(cancel_futures=True)


class _Tensor:
    """A tensor under way: its tiles, and where their sums go."""

    def __init__(self, name: str, checkpoints: Sequence[Checkpoint]) -> None:
        self.name = name
        self.count = math.prod(checkpoints[0].tensors[name].shape)
        self.run = run_elements(self.count)
        self.num_runs = max(1, -(-self.count // self.run))
        dtypes = [checkpoint.tensors[name].dtype for checkpoint in checkpoints]
        self.item_bytes = [FLOATS[dtype] for dtype in dtypes]
        self._tiles = tiles(len(checkpoints) - 1)
        # One loop after the other goes over a piece, which stays in the cache meanwhile.
        self.work: list[tuple[Tile, TileLoop, npt.NDArray[np.float64]]] = [
            (tile, tile_loop(tile, dtypes), np.zeros((self.num_runs, len(tile.products))))
            for tile in self._tiles
        ]

    def sums(self) -> Sums:
        """Puts the tiles together."""
        num_models = len(self.item_bytes)
        products_CMM = np.empty((self.num_runs, num_models, num_models))
        for tile, _loop, sums_CP in self.work:
            i_P, j_P = np.array(tile.products).T
            products_CMM[:, i_P, j_P] = products_CMM[:, j_P, i_P] = sums_CP
        return Sums(name=self.name, products_CMM=products_CMM)


class _Sweeper:
    """What the threads share."""

    def __init__(
        self, checkpoints: Sequence[Checkpoint], *, mapped: bool, pace: Pace, meter: Meter
    ) -> None:
        self.checkpoints = checkpoints
        self._pace, self._meter = pace, meter
        self._maps = [MappedFiles(checkpoint) for checkpoint in checkpoints] if mapped else None
        self._own = threading.local()
        self._stopped = False

    def stop(self) -> None:
        """Makes every thread end after its piece."""
        self._stopped = True

    def add_runs(self, tensor: _Tensor, runs: range) -> None:
        """Sums whole runs of a tensor, a piece at a time."""
        memories = self._memories()
        stop = min(runs.stop * tensor.run, tensor.count)
        row_bytes = sum(tensor.item_bytes)
        longest = max(_RUN_STEP, _PIECE_BYTES // row_bytes // _RUN_STEP * _RUN_STEP)
        if longest > tensor.run:
            longest -= longest % tensor.run
        start = runs.start * tensor.run
        while start < stop and not self._stopped:
            # A piece is several runs, or a part of one.
            end = min(stop, start + longest)
            if longest < tensor.run:
                end = min(end, (start // tensor.run + 1) * tensor.run)
            with self._pace.turn():
                began = time.monotonic()
                self._add_piece(tensor, memories, start, end - start)
                self._pace.after_work(time.monotonic() - began)
                self._pace.after_read((end - start) * row_bytes)
            self._meter.add((end - start) * row_bytes)
            start = end

    def _add_piece(
        self, tensor: _Tensor, memories: Sequence[Memory], start: int, count: int
    ) -> None:
        addresses = [
            memory.address(tensor.name, offset_bytes=start * size, nbytes=count * size)
            for memory, size in zip(memories, tensor.item_bytes, strict=True)
        ]
        row = start // tensor.run
        for tile, loop, sums_CP in tensor.work:
            loop.add(
                [addresses[model] for model in tile.models],
                count=count,
                run=tensor.run,
                sums=sums_CP.ctypes.data + row * sums_CP.strides[0],
            )

    def _memories(self) -> Sequence[Memory]:
        if self._maps is not None:
            return self._maps
        if not hasattr(self._own, "buffers"):
            self._own.buffers = [ReadBuffer(checkpoint) for checkpoint in self.checkpoints]
        buffers: list[ReadBuffer] = self._own.buffers
        return buffers


def _start(
    sweeper: _Sweeper, pool: ThreadPoolExecutor, name: str
) -> tuple[_Tensor, list[Future[None]]]:
    """Hands a tensor's runs out in shares."""
    tensor = _Tensor(name, sweeper.checkpoints)
    run_bytes = tensor.run * sum(tensor.item_bytes)
    step = max(1, _SHARE_BYTES // run_bytes)
    shares = [
        range(first, min(first + step, tensor.num_runs))
        for first in range(0, tensor.num_runs, step)
    ]
    return tensor, [pool.submit(sweeper.add_runs, tensor, share) for share in shares]
