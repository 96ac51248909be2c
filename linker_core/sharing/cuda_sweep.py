"""A sweep whose sums are computed on a CUDA device: reading, copying and adding overlap.

Imported only where a device is asked for, since it needs torch. On torch's "cpu" device it does the
same without pinned memory.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from linker_core.pace import Pace
from linker_core.sharing.pieces import Findings, Piece
from linker_core.sharing.sweep import Meter, Progress, item_bytes, piece_bytes
from linker_core.weights.checkpoint import Checkpoint

_MAX_THREADS = 4  # read ahead; each has two pairs of buffers
_cuda: Any = torch.cuda  # of which only parts are typed
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def sweep_on(device: str) -> Callable[..., Findings]:
    """Returns `sweep` with its sums on this device."""
    return partial(_sweep, torch.device(device))


def _sweep(
    device: torch.device,
    pieces: Sequence[Piece],
    donor: Checkpoint,
    variant: Checkpoint,
    *,
    mapped: bool,  # files are read into pinned memory, which the device can copy from
    pace: Pace,
    progress: Progress | None = None,
) -> Findings:
    del mapped
    # Both stay on the device to the end, so that no piece waits for its result.
    sums = torch.zeros(len(pieces), 4, dtype=torch.float64, device=device)
    counts = torch.zeros(len(pieces), 4, dtype=torch.int64, device=device)
    meter = Meter(sum(piece_bytes(piece, donor, variant) for piece in pieces), progress)
    numbers, failed = itertools.count(), threading.Event()

    def run() -> None:
        stream = _cuda.Stream(device) if device.type == "cuda" else None
        slots = itertools.cycle([_Slot(device), _Slot(device)])
        try:
            if stream is not None:
                stream.wait_stream(_cuda.default_stream(device))  # which clears `sums`
            with _cuda.stream(stream):  # None: as it was
                while (number := next(numbers)) < len(pieces) and not failed.is_set():
                    piece, slot, started = pieces[number], next(slots), time.monotonic()
                    with pace.turn():
                        slot.wait()
                        _add(piece, slot, donor, variant, sums[number], counts[number])
                        slot.mark()
                        pace.after_work(time.monotonic() - started)
                        pace.after_read(piece_bytes(piece, donor, variant))
                    meter.add(piece_bytes(piece, donor, variant))
            if stream is not None:
                stream.synchronize()
        except BaseException:
            failed.set()
            raise

    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads) as pool:
        runs = [pool.submit(run) for _ in range(num_threads)]
    for finished in runs:
        finished.result()
    return _findings(sums, counts)


class _Slot:
    """Host buffers of one piece, free again once the device has copied them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied = _cuda.Event() if self._pinned else None

    def wait(self) -> None:
        """Waits until the buffers may be written."""
        if self._copied is not None:
            self._copied.synchronize()

    def mark(self) -> None:
        """Says that everything which reads the buffers has been queued."""
        if self._copied is not None:
            self._copied.record()

    def read(self, which: int, checkpoint: Checkpoint, piece: Piece) -> torch.Tensor:
        """Returns the piece on the device, as stored."""
        size = item_bytes(checkpoint, piece.name)
        nbytes = piece.length * size
        if self._buffers[which].numel() < nbytes:
            self._buffers[which] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        buffer = self._buffers[which][:nbytes]
        checkpoint.read_into(piece.name, buffer.numpy().data, offset_bytes=piece.start * size)
        stored = buffer.to(self._device, non_blocking=True)
        return stored.view(_DTYPES[checkpoint.tensors[piece.name].dtype])


def _add(
    piece: Piece,
    slot: _Slot,
    donor: Checkpoint,
    variant: Checkpoint,
    sums: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    b = slot.read(1, variant, piece)
    counts[3] = (~torch.isfinite(b)).sum()
    if not piece.compared:
        return
    a = slot.read(0, donor, piece)
    counts[2] = (~torch.isfinite(a)).sum()
    x, y = a.double(), b.double()
    delta = x - y
    for index, (left, right) in enumerate(((x, y), (x, x), (y, y), (delta, delta))):
        sums[index] = torch.dot(left, right)
    if a.dtype == b.dtype:
        same = a.view(torch.uint8) == b.view(torch.uint8)
        counts[0] = same.all()
        if piece.row:
            counts[1] = same.view(piece.length // piece.row, -1).all(dim=1).sum()


def _findings(sums: torch.Tensor, counts: torch.Tensor) -> Findings:
    findings = Findings(len(sums))
    columns: Iterator[list[int]] = iter(counts.T.tolist())
    for place, values in enumerate(sums.flatten().tolist()):
        findings.sums[place] = values
    findings.identical[:] = bytes(next(columns))
    for target in (findings.equal_rows, findings.donor_nonfinite, findings.variant_nonfinite):
        for number, value in enumerate(next(columns)):
            target[number] = value
    return findings
