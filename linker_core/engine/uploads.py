"""Host numbers on their way to a device, without the host waiting for it."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def upload(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Returns an array as a tensor of the device; on the CPU it is the array's own memory.

    Elsewhere it goes through pinned memory, which torch's host allocator gives out again only when
    the copy is done.
    """
    tensor = torch.from_numpy(numbers)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
