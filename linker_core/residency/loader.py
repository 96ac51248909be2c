"""Plan + checkpoint -> tensors on the device: only the bytes that are not aliased move."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import torch

from linker_core.errors import BadCheckpointError, InsufficientCapacityError
from linker_core.residency.ledger import StoredTensor
from linker_core.sharing.plan import Rung, SharePlan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME

_CHUNK_BYTES = 4 << 20
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def load_tensors(
    checkpoint: Checkpoint,
    plan: SharePlan,
    donor: Mapping[str, StoredTensor],
    *,
    device: torch.device,
) -> Generator[int, None, dict[str, StoredTensor]]:
    """Moves a model's own tensors to the device, a chunk between two yields (BS algorithm 1).

    Tensors keep the checkpoint's type, so on a CPU they are the words that lie on disk. Nothing is
    read for an alias: it is the donor's own `StoredTensor`.

    Args:
        checkpoint: Where the words come from.
        plan: A rung for every tensor of the checkpoint.
        donor: The donor's tensors by name; empty for a donor.
        device: Where the tensors go.

    Yields:
        Bytes moved so far.

    Returns:
        Name -> stored tensor of the whole model; a tied head maps to the embedding's.

    Raises:
        BadCheckpointError: The plan is of another checkpoint or donor, or a file changed.
        InsufficientCapacityError: The device cannot allocate a tensor.
    """
    if plan.rungs.keys() != checkpoint.tensors.keys():
        raise BadCheckpointError("The plan lists other tensors than the checkpoint. Scan it again.")
    tensors: dict[str, StoredTensor] = {}
    done = 0
    for name, rung in plan.rungs.items():
        if rung is Rung.ALIAS:
            tensors[name] = _alias(name, checkpoint, donor)
            continue
        assert rung is Rung.OWN, rung
        tensor = _allocate(checkpoint, name, device)
        for count in _fill(tensor, checkpoint, name):
            done += count
            yield done
        tensors[name] = StoredTensor(tensor=tensor)
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
    for _ in _fill(tensor, checkpoint, name):
        pass
    return tensor


def _alias(name: str, checkpoint: Checkpoint, donor: Mapping[str, StoredTensor]) -> StoredTensor:
    stored = donor.get(name)
    if stored is None or tuple(stored.tensor.shape) != checkpoint.tensors[name].shape:
        raise BadCheckpointError(
            f"The plan aliases {name}, which the donor does not have. Scan again."
        )
    return stored


def _allocate(checkpoint: Checkpoint, name: str, device: torch.device) -> torch.Tensor:
    info = checkpoint.tensors[name]
    try:
        return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device=device)
    except RuntimeError as error:  # what both allocators raise when they have nothing left
        raise InsufficientCapacityError(
            f"The device has no {info.nbytes} bytes for {name}. Remove a model or lower the budget."
        ) from error


def _fill(tensor: torch.Tensor, checkpoint: Checkpoint, name: str) -> Generator[int, None, None]:
    """Reads a tensor's words in chunks, straight into its memory where the host can reach it."""
    flat = tensor.view(-1).view(torch.uint8)
    staging = None
    if tensor.device.type != "cpu":
        staging = torch.empty(min(_CHUNK_BYTES, len(flat)), dtype=torch.uint8, pin_memory=True)
    for start in range(0, len(flat), _CHUNK_BYTES):
        target = flat[start : start + _CHUNK_BYTES]
        host = target if staging is None else staging[: len(target)]
        checkpoint.read_into(name, host.numpy().data, offset_bytes=start)
        if staging is not None:
            target.copy_(host)
        yield len(target)
