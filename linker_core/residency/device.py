"""What memory a device has to give, and when it has none. Knows nothing of what lies on it."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Returns the bytes that can be allocated now.

    On CUDA what the driver has free; on the host what the kernel gives without swapping (it can
    drop the page cache, so that counts), within the limit of the process's control group.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_host_bytes(), _cgroup_room_bytes())


def is_lack_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an allocation failed, in Python, on a CUDA device, or in torch on the CPU."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)  # torch has no class for this one
    )


def _available_host_bytes() -> int:
    for line in _MEMINFO.read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel reports no MemAvailable")


def _cgroup_room_bytes() -> int:
    """Room below the limit of control groups version 2; without a limit there is no end to it."""
    unlimited = 1 << 63
    try:
        limit = (_CGROUP / "memory.max").read_text("ascii").strip()
        used = int((_CGROUP / "memory.current").read_text("ascii"))
    except FileNotFoundError:
        return unlimited
    return unlimited if limit == "max" else max(0, int(limit) - used)
