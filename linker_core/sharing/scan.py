"""Two checkpoints -> ScanReport: cos and ε of every block (BS Eq. 1, 2), sums of every tensor."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any, Self

from linker_core.errors import BadCheckpointError
from linker_core.sharing.similarity import PairSums, TileReader, compare, count_nonfinite
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import Section, parse_key

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Region(StrEnum):
    """How far a variant sits from its donor (DESIGN's reading of BS table 2)."""

    ALIGNED = "aligned"
    BOUNDARY = "boundary"
    OUTSIDE = "outside"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScan:
    """One decoder layer: BS Eq. 1 and Eq. 2 over all its K sub-parameters."""

    index: int
    params: Mapping[str, PairSums]  # sub-parameter -> sums

    @property
    def cos(self) -> float:
        """sim(i) of BS Eq. 1: the mean over K, norms and biases included."""
        return fmean(sums.cos for sums in self.params.values())

    @property
    def epsilon(self) -> float:
        """ε(i) of BS Eq. 2: the mean over K, norms and biases included."""
        return fmean(sums.epsilon for sums in self.params.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanReport:
    """What a scan found. Holds sums, so that other aggregations need no second reading."""

    donor: str  # as the caller named it
    variant: str
    bytes_read: int
    scan_seconds: float
    blocks: tuple[BlockScan, ...]
    outside_blocks: Mapping[str, PairSums]  # embedding, final norm, head where shapes agree

    @property
    def mean_cos(self) -> float:
        return fmean(block.cos for block in self.blocks)

    @property
    def mean_epsilon(self) -> float:
        return fmean(block.epsilon for block in self.blocks)

    @property
    def region(self) -> Region:
        return region(self.mean_cos, self.mean_epsilon)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON values; `from_json` restores it."""
        return {
            "donor": self.donor,
            "variant": self.variant,
            "bytes_read": self.bytes_read,
            "scan_seconds": self.scan_seconds,
            "mean_cos": self.mean_cos,
            "mean_epsilon": self.mean_epsilon,
            "region": self.region.value,
            "blocks": [
                {
                    "index": block.index,
                    "cos": block.cos,
                    "epsilon": block.epsilon,
                    "params": {name: _sums_record(sums) for name, sums in block.params.items()},
                }
                for block in self.blocks
            ],
            "outside_blocks": {
                name: _sums_record(sums) for name, sums in self.outside_blocks.items()
            },
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a report from `to_json`."""
        return cls(
            donor=record["donor"],
            variant=record["variant"],
            bytes_read=record["bytes_read"],
            scan_seconds=record["scan_seconds"],
            blocks=tuple(
                BlockScan(
                    index=block["index"],
                    params={name: _sums(entry) for name, entry in block["params"].items()},
                )
                for block in record["blocks"]
            ),
            outside_blocks={name: _sums(entry) for name, entry in record["outside_blocks"].items()},
        )


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


def check_same_family(donor: ModelConfig, variant: ModelConfig) -> None:
    """Refuses two models that cannot run through one skeleton.

    Vocabulary, context length, special tokens and tying belong to the variant and may differ.

    Raises:
        BadCheckpointError: Lists the fields that differ, with both values.
    """
    own = {
        "vocab_size", "max_position_embeddings", "eos_token_ids", "bos_token_id", "dtype",
        "tie_word_embeddings",
    }  # fmt: skip
    a, b = asdict(donor), asdict(variant)
    if differences := [
        f"{field}: donor {a[field]!r:.60}, variant {b[field]!r:.60}"
        for field in a
        if field not in own and a[field] != b[field]
    ]:
        raise BadCheckpointError(
            "The variant is no fine-tune of this donor: "
            + "; ".join(differences[:5])
            + ". Name another donor, or onboard it as a donor of its own."
        )


def region(mean_cos: float, mean_epsilon: float) -> Region:
    """Returns the region of a pair from its means over all blocks."""
    if mean_cos < 0.97 or mean_epsilon > 0.25:
        return Region.OUTSIDE
    if mean_epsilon > 0.10 or mean_cos < 0.99:
        return Region.BOUNDARY
    return Region.ALIGNED


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


def _sums_record(sums: PairSums) -> dict[str, Any]:
    return {"cos": sums.cos, "epsilon": sums.epsilon, **asdict(sums)}


def _sums(record: Mapping[str, Any]) -> PairSums:
    return PairSums(**{key: record[key] for key in PairSums.__dataclass_fields__})
