"""What a variant stores and what it aliases, tensor by tensor, with exact bytes. Moves nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, Self

from linker_core.sharing.price import Price
from linker_core.sharing.report import Region
from linker_core.sharing.rungs import (
    COARSE,
    AnyRung,
    Residual,
    Rung,
    coarse,
    kind_of,
    parse_rung,
    residual_bytes,
)
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import parse_key
from linker_core.weights.safetensors_header import TensorInfo
from linker_core.weights.shapes import expected_tensors

_ROW_POSITION_BYTES = 8  # where an own row belongs, int64


class HasConfig(Protocol):
    """A checkpoint, or a delta to one."""

    @property
    def config(self) -> ModelConfig: ...


class Policy(StrEnum):
    """How rungs are chosen. A donor holds everything itself."""

    DONOR = "donor"
    BUDGET = "budget"  # fewest bytes whose measured price stays within a budget
    THRESHOLDS = "thresholds"  # BS Eq. 3
    BYTES = "bytes"  # lowest measured price within a byte limit
    EXACT = "exact"  # what is byte-identical
    DELTA = "delta"  # as a delta file says
    ADAPTER = "adapter"  # what a LoRA adapter changes


class Fingerprints(NamedTuple):
    """What a pair of checkpoints is."""

    donor: str
    variant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts:
    """Blocks by rung; a block's rung is the dearest among its matrices."""

    alias: int
    residual: int
    own: int

    @property
    def total(self) -> int:
        return self.alias + self.residual + self.own

    def to_json(self) -> dict[str, int]:
        """Returns the counts and their sum."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, slots=True, kw_only=True)
class SharePlan:
    """Every rung of a variant, with the thresholds, both fingerprints and the byte totals.

    Bytes are those that are resident. logical is what a separate copy would hold, unique what only
    this variant holds, shared what it reads from the donor: logical = unique + shared.
    """

    policy: Policy
    tau_cos: float | None
    tau_frob: float | None
    threshold_source: str | None  # Thresholds.source
    donor_fingerprint: str | None
    variant_fingerprint: str
    rungs: Mapping[str, AnyRung]  # every stored tensor
    own_rows: Mapping[str, int]  # of the tensors on rung ROWS: rows that are not the donor's
    logical_bytes: int
    unique_bytes: int
    rung_bytes: Mapping[str, int]  # unique bytes by `kind_of` the rung; only what occurs
    num_weights: int  # elements of all tensors
    checkpoint_bytes: int  # what the tensors take on disk
    blocks: BlockCounts
    price: Price | None  # None: not measured
    budget_kl: float | None  # nats per response token that the price was held against
    mean_cos: float | None  # of a scan; None: the pair was not scanned
    mean_epsilon: float | None
    region: Region | None

    @property
    def shared_bytes(self) -> int:
        return self.logical_bytes - self.unique_bytes

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """The totals as they are shown to operators."""
        return {
            "logical": self.logical_bytes,
            "unique": self.unique_bytes,
            "shared": self.shared_bytes,
            "checkpoint": self.checkpoint_bytes,
        }

    @property
    def bits_per_weight(self) -> float:
        """What only this variant holds, embedding, norms and scales included."""
        return 8 * self.unique_bytes / self.num_weights

    @property
    def has_residuals(self) -> bool:
        return any(isinstance(rung, Residual) for rung in self.rungs.values())

    @property
    def blocks_shared(self) -> int:
        return self.blocks.alias

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values; `from_json` restores it."""
        return {
            **{field: getattr(self, field) for field in self.__dataclass_fields__},
            "rungs": {name: str(rung) for name, rung in self.rungs.items()},
            "own_rows": dict(self.own_rows),
            "rung_bytes": dict(self.rung_bytes),
            "blocks": self.blocks.to_json(),
            "price": None if self.price is None else self.price.to_json(),
            "shared_bytes": self.shared_bytes,
            "blocks_shared": self.blocks_shared,
            "bits_per_weight": self.bits_per_weight,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a plan from `to_json`."""
        stored = {field: record[field] for field in cls.__dataclass_fields__}
        counts = {rung: record["blocks"][rung] for rung in BlockCounts.__dataclass_fields__}
        return cls(
            **stored
            | {
                "policy": Policy(record["policy"]),
                "rungs": {name: parse_rung(rung) for name, rung in record["rungs"].items()},
                "blocks": BlockCounts(**counts),
                "price": None if record["price"] is None else Price.from_json(record["price"]),
                "region": None if record["region"] is None else Region(record["region"]),
            }
        )


class PlanBytes(NamedTuple):
    """What a choice of rungs takes on the device."""

    logical_bytes: int
    unique_bytes: int
    rung_bytes: dict[str, int]  # unique bytes by kind of rung


def plan_bytes(
    rungs: Mapping[str, AnyRung],
    own_rows: Mapping[str, int],
    *,
    donor: Checkpoint,
    variant: Checkpoint,
) -> PlanBytes:
    """Returns exact bytes. An alias is resident in the donor's type, all else in the variant's."""
    logical = 0
    by_kind: dict[str, int] = {}
    for name, rung in rungs.items():
        tensor = donor.tensors[name] if rung is Rung.ALIAS else variant.tensors[name]
        logical += tensor.nbytes
        unique = tensor_bytes(
            rung, tensor, num_own_rows=own_rows.get(name), donor=donor.tensors.get(name)
        )
        by_kind[kind_of(rung)] = by_kind.get(kind_of(rung), 0) + unique
    return PlanBytes(logical, sum(by_kind.values()), by_kind)


def tensor_bytes(
    rung: AnyRung, tensor: TensorInfo, *, num_own_rows: int | None, donor: TensorInfo | None
) -> int:
    """Returns the unique bytes of one tensor on a rung.

    Args:
        rung: Which.
        tensor: The variant's.
        num_own_rows: On rung ROWS: how many are not the donor's.
        donor: The donor's tensor of the same name, or None if it has none.
    """
    if rung is Rung.ALIAS:
        return 0
    if rung is Rung.ROWS:
        assert num_own_rows is not None
        return rows_bytes(tensor, num_own_rows)
    if rung is Rung.OWN:
        return tensor.nbytes
    assert isinstance(rung, Residual)
    assert donor is not None
    rows, width = tensor.shape
    shared_rows = min(rows, donor.shape[0])
    # Rows that the donor lacks, of added tokens, are kept as they are.
    extra_bytes = (rows - shared_rows) * (tensor.nbytes // rows)
    return residual_bytes(rung, shared_rows, width) + extra_bytes


def count_weights(model: HasConfig) -> int:
    """Returns the elements of all tensors; tied ones count once."""
    return sum(math.prod(shape) for shape in expected_tensors(model.config).values())


def rows_bytes(tensor: TensorInfo, num_own_rows: int) -> int:
    """Returns what a tensor takes of which only some rows are stored, their positions included."""
    return num_own_rows * (tensor.nbytes // tensor.shape[0] + _ROW_POSITION_BYTES)


def count_blocks(rungs: Mapping[str, AnyRung], model: HasConfig) -> BlockCounts:
    """Counts blocks by the dearest rung among their matrices: own, else residual, else alias."""
    shapes = expected_tensors(model.config)
    dearest = [Rung.ALIAS.value] * model.config.num_layers
    for name, rung in rungs.items():
        key = parse_key(name)
        assert key is not None
        if key.layer is not None and len(shapes[name]) == 2:
            dearest[key.layer] = max(dearest[key.layer], coarse(rung), key=COARSE.index)
    return BlockCounts(
        alias=dearest.count("alias"),
        residual=dearest.count("residual"),
        own=dearest.count("own"),
    )
