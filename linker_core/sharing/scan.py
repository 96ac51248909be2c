"""Two checkpoints -> ScanReport: cos and ε of every block (BS Eq. 1, 2), sums of every tensor."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from linker_core.errors import BadCheckpointError
from linker_core.sharing.family import check_same_family
from linker_core.sharing.report import BlockScan, ScanReport
from linker_core.sharing.similarity import PairSums, TileReader, compare, count_nonfinite
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME, Section, parse_key

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def scan(donor: Checkpoint, variant: Checkpoint, *, progress: Progress | None = None) -> ScanReport:
    """Compares every tensor that both have in the same shape, on all cores.

    Host memory is a few tiles a thread, whatever the size of the models.

    Args:
        donor: The model whose storage would be aliased.
        variant: The model that would alias it.
        progress: Called from several threads with bytes read and bytes to read.

    Raises:
        BadCheckpointError: Different families, NaN or infinite weights, or a file that changed.
    """
    check_same_family(donor.config, variant.config)
    started = time.monotonic()
    names = [
        name
        for name, tensor in variant.tensors.items()
        if name in donor.tensors and donor.tensors[name].shape == tensor.shape
    ]
    total = sum(donor.tensors[name].nbytes + variant.tensors[name].nbytes for name in names)
    meter = _Meter(total, progress)
    readers = threading.local()

    def compare_one(name: str) -> PairSums:
        if not hasattr(readers, "pair"):
            readers.pair = TileReader(donor), TileReader(variant)
        elements = math.prod(variant.tensors[name].shape)
        pair_bytes = donor.tensors[name].nbytes + variant.tensors[name].nbytes
        return compare(
            name,
            *readers.pair,
            count=elements,
            progress=lambda count: meter.add(count * pair_bytes // elements),
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = dict(zip(names, pool.map(compare_one, names), strict=True))
    _refuse_nonfinite(donor, {n: int(not math.isfinite(s.donor_square)) for n, s in sums.items()})
    _refuse_nonfinite(variant, {name: s.num_nonfinite for name, s in sums.items()})
    check_finite(variant, names=variant.tensors.keys() - sums.keys())
    return ScanReport(
        donor=str(donor.path),
        variant=str(variant.path),
        bytes_read=total,
        scan_seconds=time.monotonic() - started,
        blocks=_blocks(variant.config, sums),
        outside_blocks={
            name: s for name, s in sums.items() if _section(name) is not Section.BLOCKS
        },
        identical_rows=_identical_rows(donor, variant),
    )


def check_finite(checkpoint: Checkpoint, *, names: Iterable[str] | None = None) -> None:
    """Refuses a checkpoint with NaN or infinite weights.

    Args:
        checkpoint: The model.
        names: The tensors to look at; None means all.

    Raises:
        BadCheckpointError: Names the first such tensor.
    """
    reader = TileReader(checkpoint)
    counts = {
        name: count_nonfinite(name, reader, count=math.prod(checkpoint.tensors[name].shape))
        for name in (checkpoint.tensors if names is None else sorted(names))
    }
    _refuse_nonfinite(checkpoint, counts)


def _identical_rows(donor: Checkpoint, variant: Checkpoint) -> dict[str, int]:
    counts = {}
    for name in (EMBED_NAME, LM_HEAD_NAME):
        a, b = donor.tensors.get(name), variant.tensors.get(name)
        if a is None or b is None or (a.dtype, a.shape[1]) != (b.dtype, b.shape[1]):
            continue
        rows, row_bytes = min(a.shape[0], b.shape[0]), b.nbytes // b.shape[0]
        pair = [bytearray(row_bytes), bytearray(row_bytes)]
        counts[name] = 0
        for row in range(rows):
            for checkpoint, buffer in zip((donor, variant), pair, strict=True):
                checkpoint.read_into(name, memoryview(buffer), offset_bytes=row * row_bytes)
            counts[name] += pair[0] == pair[1]
    return counts


class _Meter:
    """Adds up what several threads have done. The lock guards `_done`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._total)


def _blocks(config: ModelConfig, sums: Mapping[str, PairSums]) -> tuple[BlockScan, ...]:
    params: list[dict[str, PairSums]] = [{} for _ in range(config.num_layers)]
    for name, pair in sums.items():
        key = parse_key(name)
        assert key is not None
        if key.layer is not None:
            params[key.layer][key.parameter] = pair
    return tuple(BlockScan(index=index, params=block) for index, block in enumerate(params))


def _section(name: str) -> Section:
    key = parse_key(name)
    assert key is not None
    return key.section


def _refuse_nonfinite(checkpoint: Checkpoint, counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if count:
            file = checkpoint.shard_names[checkpoint.tensors[name].shard]
            raise BadCheckpointError(
                f"{file}: tensor {name} has NaN or infinite weights ({count} seen). The training "
                "run that wrote it diverged; export an earlier step."
            )
