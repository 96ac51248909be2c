"""Plan + checkpoint or delta file -> tensors on the device: what is not aliased moves, no more."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping

import torch

from linker_core.errors import BadCheckpointError
from linker_core.residency.delta_tensors import load_entry, load_listed_rows, load_residual
from linker_core.residency.own_memory import OwnMemory
from linker_core.residency.own_rows import load_rows
from linker_core.residency.reading import Source, allocate_like, fill
from linker_core.residency.stored import Stored, StoredTensor, distinct
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import AnyRung, Residual, Rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from linker_core.weights.safetensors_header import TensorInfo
from linker_core.weights.shapes import expected_tensors


def load_tensors(
    source: Source,
    plan: SharePlan,
    donor: Mapping[str, Stored],
    *,
    device: torch.device,
    done_bytes: int = 0,
) -> Generator[int, None, dict[str, Stored]]:
    """Moves a model's own tensors to the device, a chunk between two yields (BS algorithm 1).

    Tensors keep the file's type, so on a CPU they are the words that lie on disk. Nothing is read
    for an alias: it is the donor's own `StoredTensor`. A delta file holds what is kept. Of a
    checkpoint's tensor on rung ROWS all is read and compared with the donor's, but only the rows
    that differ are kept.

    Args:
        source: Where the words come from; a delta file if the plan has residuals.
        plan: A rung for every tensor of the model; a delta file's own.
        donor: The donor's tensors by name, as far as the plan leans on them; empty for a donor.
        device: Where the tensors go.
        done_bytes: Moved for this model before.

    Yields:
        Bytes moved so far, once before the first of them is read.

    Returns:
        Name -> what is stored, of the whole model; a tied head maps to the embedding's.

    Raises:
        BadCheckpointError: The plan is of another checkpoint or donor, or a file changed.
        InsufficientCapacityError: The device cannot allocate a tensor.
    """
    _check_plan(source, plan)
    shapes = expected_tensors(source.config)
    tensors: dict[str, Stored] = {}
    done = done_bytes
    yield done
    memory = OwnMemory(_leaving_at_once(source, plan), device=device)
    for name, rung in plan.rungs.items():
        if rung is Rung.ALIAS:
            tensors[name] = _alias(name, shapes[name], donor)
            continue
        if isinstance(source, DeltaFile):
            shape, base = shapes[name], donor.get(name)
            arriving = _from_delta(source, name, rung, base, shape=shape, memory=memory)
        else:
            arriving = _from_checkpoint(source, name, plan, donor.get(name), memory)
        tensors[name], done = yield from _counted(arriving, done)
    if source.config.tie_word_embeddings:
        tensors[LM_HEAD_NAME] = tensors[EMBED_NAME]
    _check_logical_bytes(plan, tensors)
    return tensors


def load_base(
    base: Checkpoint, lacking: Iterable[TensorInfo], *, device: torch.device
) -> Generator[int, None, dict[str, StoredTensor]]:
    """Moves tensors of a base checkpoint to the device, a chunk between two yields.

    Yields:
        Bytes moved so far, 0 before the first of them is read.

    Raises:
        BadCheckpointError: A file changed.
        InsufficientCapacityError: The device cannot allocate a tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    done = 0
    yield done
    for info in lacking:
        tensor = allocate_like(info, device=device)
        for nbytes in fill(tensor, base, info.name):
            done += nbytes
            yield done
        tensors[info.name] = StoredTensor(tensor=tensor)
    return tensors


def read_tensor(checkpoint: Checkpoint, name: str, *, device: torch.device) -> torch.Tensor:
    """Returns one tensor of a checkpoint on the device, in the checkpoint's type.

    Raises:
        BadCheckpointError: A file changed.
        InsufficientCapacityError: The device cannot allocate it.
    """
    tensor = allocate_like(checkpoint.tensors[name], device=device)
    for _ in fill(tensor, checkpoint, name):
        pass
    return tensor


def _leaving_at_once(source: Source, plan: SharePlan) -> list[TensorInfo]:
    """Returns what is held whole for this model alone; a donor's leave one by one."""
    if plan.donor_fingerprint is None:
        return []
    if isinstance(source, DeltaFile):
        return list(source.tensors.values())
    return [source.tensors[name] for name, rung in plan.rungs.items() if rung is Rung.OWN]


def _check_plan(source: Source, plan: SharePlan) -> None:
    """Refuses a plan that was not made for these files.

    Raises:
        BadCheckpointError: See above.
    """
    if isinstance(source, DeltaFile):
        if (plan.rungs, plan.own_rows) != (source.plan.rungs, source.plan.own_rows):
            raise BadCheckpointError("The delta file is of another plan. Encode the variant again.")
    elif plan.rungs.keys() != source.tensors.keys():
        raise BadCheckpointError("The plan lists other tensors than the checkpoint. Scan it again.")


def _check_logical_bytes(plan: SharePlan, tensors: Mapping[str, Stored]) -> None:
    """Refuses a plan whose aliases are of other types than it says; only a delta file's can be.

    Raises:
        BadCheckpointError: See above.
    """
    logical_bytes = sum(entry.logical_bytes for entry in distinct(tensors))
    if logical_bytes != plan.logical_bytes:
        raise BadCheckpointError(
            f"The plan says that a copy of the model takes {plan.logical_bytes} bytes; over this "
            f"donor it takes {logical_bytes}. Load the donor that it was made for."
        )


def _alias(name: str, shape: tuple[int, ...], donor: Mapping[str, Stored]) -> Stored:
    stored = donor.get(name)
    if not isinstance(stored, StoredTensor) or tuple(stored.tensor.shape) != shape:
        raise BadCheckpointError(
            f"The plan aliases {name}, which the donor does not have. Scan again."
        )
    return stored


def _from_checkpoint(
    checkpoint: Checkpoint,
    name: str,
    plan: SharePlan,
    base: Stored | None,
    memory: OwnMemory,
) -> Generator[int, None, Stored]:
    if plan.rungs[name] is Rung.ROWS:
        return (yield from load_rows(checkpoint, name, base, num_own=plan.own_rows[name]))
    assert plan.rungs[name] is Rung.OWN, "compressed deltas lie in delta files"
    tensor = memory.allocate_like(checkpoint.tensors[name])
    yield from fill(tensor, checkpoint, name)
    return StoredTensor(tensor=tensor)


def _from_delta(
    delta: DeltaFile,
    name: str,
    rung: AnyRung,
    base: Stored | None,
    *,
    shape: tuple[int, ...],
    memory: OwnMemory,
) -> Generator[int, None, Stored]:
    if isinstance(rung, Residual):
        return (yield from load_residual(delta, name, rung, base, shape=shape, memory=memory))
    if rung is Rung.ROWS:
        return (yield from load_listed_rows(delta, name, base, shape=shape, memory=memory))
    return StoredTensor(tensor=(yield from load_entry(delta, name, memory)))


def _counted(
    arriving: Generator[int, None, Stored], done: int
) -> Generator[int, None, tuple[Stored, int]]:
    """Yields running totals where `arriving` yields the bytes of each chunk."""
    while True:
        try:
            done += next(arriving)
        except StopIteration as end:
            return end.value, done
        yield done
