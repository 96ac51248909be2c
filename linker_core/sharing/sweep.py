"""Goes over pieces of two checkpoints on all cores and notes what each piece held.

Host memory is a buffer a thread, or none where files are mapped, whatever the size of the models.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from linker_core.pace import Pace
from linker_core.sharing.kernel import Kernels, load_kernels
from linker_core.sharing.memory import MappedFiles, Memory, ReadBuffer
from linker_core.sharing.pieces import SUMS_PER_PIECE, Findings, Piece
from linker_core.weights.checkpoint import Checkpoint

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def sweep(
    pieces: Sequence[Piece],
    donor: Checkpoint,
    variant: Checkpoint,
    *,
    mapped: bool,
    pace: Pace,
    progress: Progress | None = None,
) -> Findings:
    """Returns what the pieces hold.

    Args:
        pieces: In the order in which they are read.
        donor: The checkpoint that compared pieces are compared with.
        variant: The checkpoint whose pieces these are.
        mapped: Read the files through maps, twice as fast: a file that is cut short then ends this
            process.
        pace: Holds back while sequences run.
        progress: Called from several threads with bytes read and bytes to read.

    Raises:
        BadCheckpointError: A file changed.
    """
    sweeper = _Sweeper(pieces, donor, variant, mapped=mapped, pace=pace, progress=progress)
    num_threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(num_threads) as pool:
        runs = [pool.submit(sweeper.run) for _ in range(num_threads)]
    for run in runs:
        run.result()
    return sweeper.findings


def piece_bytes(piece: Piece, donor: Checkpoint, variant: Checkpoint) -> int:
    """Returns how many bytes of the two files a piece is."""
    items = item_bytes(variant, piece.name)
    if piece.compared:
        items += item_bytes(donor, piece.name)
    return piece.length * items


class _Sweeper:
    """The work all threads take from."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        donor: Checkpoint,
        variant: Checkpoint,
        *,
        mapped: bool,
        pace: Pace,
        progress: Progress | None,
    ) -> None:
        self.findings = Findings(len(pieces))
        self._kernels: Kernels = load_kernels()
        self._pieces, self._pace = pieces, pace
        self._donor, self._variant = donor, variant
        self._maps = (MappedFiles(donor), MappedFiles(variant)) if mapped else None
        # Each thread takes the next number; `next` of a count is one step of the interpreter.
        self._numbers = itertools.count()
        self._failed = False
        total = sum(piece_bytes(piece, donor, variant) for piece in pieces)
        self._meter = Meter(total, progress)
        # The kernel writes its sums here; the array outlives every run and never grows.
        self._sums_at = self.findings.sums.buffer_info()[0]

    def run(self) -> None:
        """Takes pieces until there are none left, or another thread failed."""
        memories: tuple[Memory, Memory] = self._maps or (
            ReadBuffer(self._donor),
            ReadBuffer(self._variant),
        )
        try:
            while (number := next(self._numbers)) < len(self._pieces) and not self._failed:
                piece = self._pieces[number]
                nbytes = piece_bytes(piece, self._donor, self._variant)
                with self._pace.turn():
                    started = time.monotonic()
                    if piece.compared:
                        self._compare(number, piece, *memories)
                    else:
                        self._look(number, piece, memories[1])
                    self._pace.after_work(time.monotonic() - started)
                    self._pace.after_read(nbytes)
                self._meter.add(nbytes)
        except BaseException:
            self._failed = True
            raise

    def _compare(self, number: int, piece: Piece, donor: Memory, variant: Memory) -> None:
        name, count = piece.name, piece.length
        types = self._donor.tensors[name].dtype, self._variant.tensors[name].dtype
        a = _address(donor, self._donor, piece)
        b = _address(variant, self._variant, piece)
        self._kernels.sums(*types)(a, b, count, self._sums_at + 8 * SUMS_PER_PIECE * number)
        _dot, donor_square, variant_square, delta_square = self.findings.piece_sums(number)
        # Whatever is not finite shows in the squares: those of finite weights cannot overflow.
        if not math.isfinite(donor_square):
            found = self._kernels.count_nonfinite(types[0], a, count)
            self.findings.donor_nonfinite[number] = found
        if not math.isfinite(variant_square):
            found = self._kernels.count_nonfinite(types[1], b, count)
            self.findings.variant_nonfinite[number] = found
        size = item_bytes(self._variant, name)
        # Bytes are compared only where the values agree: -0.0 equals 0.0 but is another word.
        self.findings.identical[number] = (
            delta_square == 0.0
            and types[0] == types[1]
            and self._kernels.same_bytes(a, b, count * size)
        )
        if piece.row:
            rows = count // piece.row
            self.findings.equal_rows[number] = (
                rows
                if self.findings.identical[number]
                else self._kernels.count_equal_rows(a, b, rows=rows, row_bytes=piece.row * size)
            )

    def _look(self, number: int, piece: Piece, variant: Memory) -> None:
        dtype = self._variant.tensors[piece.name].dtype
        address = _address(variant, self._variant, piece)
        self.findings.variant_nonfinite[number] = self._kernels.count_nonfinite(
            dtype, address, piece.length
        )


class Meter:
    """Adds up what several threads have done. The lock guards `_done`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Counts bytes that were read; any thread."""
        if self._progress is None:
            return
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._total)


def _address(memory: Memory, checkpoint: Checkpoint, piece: Piece) -> int:
    size = item_bytes(checkpoint, piece.name)
    return memory.address(piece.name, offset_bytes=piece.start * size, nbytes=piece.length * size)


def item_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Returns the bytes of one element."""
    tensor = checkpoint.tensors[name]
    return tensor.nbytes // math.prod(tensor.shape)
