"""Whether the entries of a delta file are those that its plan asks for, to the byte.

Knows headers alone, no data and no donor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from linker_core.errors import BadCheckpointError
from linker_core.sharing.delta_layout import DELTA_FILE, ITEM_BYTES, deciding_entry, entries_of
from linker_core.sharing.plan import HasConfig, SharePlan, count_blocks
from linker_core.sharing.rungs import AnyRung, Residual, kind_of
from linker_core.weights.architecture import CONFIG_FILE
from linker_core.weights.safetensors_header import FLOATS, TensorInfo
from linker_core.weights.shapes import expected_tensors

Shapes = Mapping[str, tuple[int, ...]]


def check_entries(
    plan: SharePlan, shapes: Shapes, found: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Returns the entries in the plan's order; they are exactly those of its rungs.

    Args:
        plan: A rung for every tensor.
        shapes: Name -> shape of every tensor of the model.
        found: What the header lists.

    Raises:
        BadCheckpointError: One is missing, too many, or of another type or shape.
    """
    expected = {
        entry.name: entry
        for name, rung in plan.rungs.items()
        for entry in entries_of(
            name,
            rung,
            shapes[name],
            _own_type(name, rung, found),
            num_rows=_num_rows(plan, name, shapes[name], found),
        )
    }
    if odd := sorted(found.keys() ^ expected.keys()):
        state = "is missing" if odd[0] in expected else "is not part of the plan"
        raise BadCheckpointError(
            f"{DELTA_FILE}: entry {odd[0]:.200} {state} ({len(odd)} such). Export again."
        )
    for name, entry in expected.items():
        stored = found[name]
        if (stored.dtype, stored.shape) != (entry.dtype, entry.shape):
            raise BadCheckpointError(
                f"{DELTA_FILE}: entry {name} is {stored.dtype} {list(stored.shape)}, the plan asks "
                f"for {entry.dtype} {list(entry.shape)}. Export again."
            )
    return {name: found[name] for name in expected}


def check_totals(plan: SharePlan, model: HasConfig, entries: Mapping[str, TensorInfo]) -> None:
    """Works the plan's bytes and blocks out of the entries, which `check_entries` has accepted.

    The donor's types are unknown here, so what it lends is known within a factor of two only.

    Raises:
        BadCheckpointError: A number is another one.
    """
    shapes = expected_tensors(model.config)
    stored_bytes = dict.fromkeys(plan.rungs, 0)
    for entry in entries.values():
        stored_bytes[tensor_of(entry.name, shapes)] += entry.nbytes
    by_kind: dict[str, int] = {}
    whole = lent = 0
    for name, rung in plan.rungs.items():
        by_kind[kind_of(rung)] = by_kind.get(kind_of(rung), 0) + stored_bytes[name]
        if deciding := deciding_entry(name, rung):
            whole += math.prod(shapes[name]) * ITEM_BYTES[entries[deciding].dtype]
        else:
            lent += math.prod(shapes[name])
    possible = range(whole + lent * min(FLOATS.values()), whole + lent * max(FLOATS.values()) + 1)
    derived = {
        "rung_bytes": plan.rung_bytes == by_kind,
        "unique_bytes": plan.unique_bytes == sum(by_kind.values()),
        "logical_bytes": plan.logical_bytes in possible,
        "checkpoint_bytes": plan.checkpoint_bytes in possible,
        "blocks": plan.blocks == count_blocks(plan.rungs, model),
    }
    for key, agrees in derived.items():
        if not agrees:
            raise BadCheckpointError(
                f"{DELTA_FILE}: plan: {key} is {getattr(plan, key)!r:.100}, which the entries and "
                f"{CONFIG_FILE} contradict. Export again."
            )


def tensor_of(entry: str, shapes: Shapes) -> str:
    """Returns the tensor that an entry is part of."""
    name = entry
    while name not in shapes:
        name = name.rpartition(".")[0]
    return name


def _own_type(name: str, rung: AnyRung, found: Mapping[str, TensorInfo]) -> str:
    """Returns the variant's type of a tensor.

    Where there is none, it is one that the entry will turn out not to have.
    """
    deciding = deciding_entry(name, rung)
    entry = None if deciding is None else found.get(deciding)
    return entry.dtype if entry is not None and entry.dtype in FLOATS else next(iter(FLOATS))


def _num_rows(
    plan: SharePlan, name: str, shape: tuple[int, ...], found: Mapping[str, TensorInfo]
) -> int:
    """Returns how many rows of a tensor are stored as they are."""
    rung = plan.rungs[name]
    if not isinstance(rung, Residual):
        return plan.own_rows.get(name, 0)
    extra = found.get(f"{name}.extra")
    num_rows = extra.shape[0] if extra is not None and extra.shape else 0
    if num_rows > shape[0] - max(1, rung.rank):
        raise BadCheckpointError(
            f"{DELTA_FILE}: entry {name}.extra has {num_rows} rows, which leaves too few of "
            f"{shape[0]} for rung {rung}. Export again."
        )
    return num_rows
