"""Plan + checkpoint -> tensors on the device: only the bytes that are not aliased move."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import torch

from linker_core.errors import BadCheckpointError
from linker_core.residency.ledger import Stored, StoredTensor
from linker_core.residency.own_rows import load_rows
from linker_core.residency.reading import TORCH_DTYPES, allocate, fill
from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import Rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME


def load_tensors(
    checkpoint: Checkpoint,
    plan: SharePlan,
    donor: Mapping[str, Stored],
    *,
    device: torch.device,
) -> Generator[int, None, dict[str, Stored]]:
    """Moves a model's own tensors to the device, a chunk between two yields (BS algorithm 1).

    Tensors keep the checkpoint's type, so on a CPU they are the words that lie on disk. Nothing is
    read for an alias: it is the donor's own `StoredTensor`. Of a tensor on rung ROWS all is read
    and compared with the donor's, but only the rows that differ are kept.

    Args:
        checkpoint: Where the words come from.
        plan: A rung for every tensor of the checkpoint.
        donor: The donor's tensors by name; empty for a donor.
        device: Where the tensors go.

    Yields:
        Bytes moved so far, 0 before the first of them is read.

    Returns:
        Name -> what is stored, of the whole model; a tied head maps to the embedding's.

    Raises:
        BadCheckpointError: The plan is of another checkpoint or donor, or a file changed.
        InsufficientCapacityError: The device cannot allocate a tensor.
    """
    if plan.rungs.keys() != checkpoint.tensors.keys():
        raise BadCheckpointError("The plan lists other tensors than the checkpoint. Scan it again.")
    tensors: dict[str, Stored] = {}
    arriving: Generator[int, None, Stored]
    done = 0
    yield done
    for name, rung in plan.rungs.items():
        if rung is Rung.ALIAS:
            tensors[name] = _alias(name, checkpoint, donor)
            continue
        if rung is Rung.ROWS:
            base = donor.get(name)
            arriving = load_rows(checkpoint, name, base, num_own=plan.own_rows[name])
        else:
            assert rung is Rung.OWN, rung
            arriving = _load_whole(checkpoint, name, device)
        tensors[name], done = yield from _counted(arriving, done)
    if checkpoint.config.tie_word_embeddings:
        tensors[LM_HEAD_NAME] = tensors[EMBED_NAME]
    return tensors


def read_tensor(checkpoint: Checkpoint, name: str, *, device: torch.device) -> torch.Tensor:
    """Returns one tensor of a checkpoint on the device, in the checkpoint's type.

    Raises:
        BadCheckpointError: A file changed.
        InsufficientCapacityError: The device cannot allocate it.
    """
    tensor = _allocate(checkpoint, name, device)
    for _ in fill(tensor, checkpoint, name):
        pass
    return tensor


def _alias(name: str, checkpoint: Checkpoint, donor: Mapping[str, Stored]) -> Stored:
    stored = donor.get(name)
    if not isinstance(stored, StoredTensor) or (
        tuple(stored.tensor.shape) != checkpoint.tensors[name].shape
    ):
        raise BadCheckpointError(
            f"The plan aliases {name}, which the donor does not have. Scan again."
        )
    return stored


def _allocate(checkpoint: Checkpoint, name: str, device: torch.device) -> torch.Tensor:
    info = checkpoint.tensors[name]
    return allocate(info.shape, TORCH_DTYPES[info.dtype], device=device, what=name)


def _load_whole(
    checkpoint: Checkpoint, name: str, device: torch.device
) -> Generator[int, None, StoredTensor]:
    tensor = _allocate(checkpoint, name, device)
    yield from fill(tensor, checkpoint, name)
    return StoredTensor(tensor=tensor)


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
