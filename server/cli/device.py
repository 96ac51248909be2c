"""Whether the device is there, found out without torch and before anything is started."""

from __future__ import annotations

import subprocess
import sys

from linker_core.errors import InvalidRequestError

# In a process of its own, so that the driver is in none that serves.
_PROBE = "import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))"


def check_device(device: str) -> None:
    """Refuses a device that this machine does not have; the engine tries what is left.

    Raises:
        InvalidRequestError: No NVIDIA driver, or none of its devices may be used.
    """
    if device != "cuda":
        return
    done = subprocess.run(
        [sys.executable, "-I", "-c", _PROBE], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = "there is no NVIDIA driver (libcuda.so.1)"
    elif (code := done.stdout.strip()) != "0":
        reason = f"the NVIDIA driver finds none (error {code})"
    else:
        return
    raise InvalidRequestError(
        f"The device cuda cannot be used: {reason}. Choose --device cpu.", param="device"
    )
