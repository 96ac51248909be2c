"""Which arithmetic a device computes with, and in which type."""

from __future__ import annotations

import torch

from linker_core.engine.arithmetic import Arithmetic, TorchArithmetic
from linker_core.engine.cpu.arithmetic import CompiledArithmetic


def arithmetic_for(device: torch.device, *, rounded: bool = False) -> Arithmetic:
    """Returns the arithmetic of a device.

    Args:
        device: Where everything lies.
        rounded: See `CompiledArithmetic`; nothing elsewhere.
    """
    return CompiledArithmetic(rounded=rounded) if device.type == "cpu" else TorchArithmetic()


def activation_dtype(device: torch.device) -> torch.dtype:
    """Returns the type of activations: float32 on the CPU, over the checkpoint's own words."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
