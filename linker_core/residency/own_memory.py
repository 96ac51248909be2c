"""Memory for what only one model reaches, and which therefore leaves all at once.

Fresh memory costs the host more than reading a cached file does, and several times more in small
pages than in huge ones. So what is smaller than a huge page lies together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from linker_core.errors import InsufficientCapacityError
from linker_core.residency.reading import (
    HUGE_PAGE_BYTES,
    TORCH_DTYPES,
    allocate_like,
    map_host_memory,
)
from linker_core.weights.safetensors_header import TensorInfo

_ALIGNMENT = 64  # bytes; a cache line


class OwnMemory:
    """Tensors of one model, each with a storage of its own.

    On the host those that are small are parts of one mapping, of just their size, which goes when
    the last of them does.

    Args:
        tensors: What will be asked for; each at most once.
        device: Where they go.

    Raises:
        InsufficientCapacityError: The host has none left.
    """

    def __init__(self, tensors: Iterable[TensorInfo], *, device: torch.device) -> None:
        self.device = device
        nbytes = sum(_aligned(tensor.nbytes) for tensor in tensors if _is_small(tensor))
        self._mapping = None
        self._taken_bytes = 0
        if device.type == "cpu" and nbytes >= HUGE_PAGE_BYTES:
            try:
                self._mapping = map_host_memory(nbytes)
            except OSError as error:
                raise InsufficientCapacityError(
                    f"The host has no {nbytes} bytes for the small weights of a model. Remove a "
                    "model or lower the budget."
                ) from error

    def allocate_like(self, info: TensorInfo) -> torch.Tensor:
        """Returns memory for a tensor of a file, in its type.

        Raises:
            InsufficientCapacityError: The device has none left for it.
        """
        if self._mapping is None or not _is_small(info):
            return allocate_like(info, device=self.device)
        first = self._taken_bytes
        self._taken_bytes += _aligned(info.nbytes)
        dtype = TORCH_DTYPES[info.dtype]
        count = info.nbytes // dtype.itemsize
        words = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=first)
        return words.view(info.shape)


def _is_small(info: TensorInfo) -> bool:
    return 0 < info.nbytes < HUGE_PAGE_BYTES


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
