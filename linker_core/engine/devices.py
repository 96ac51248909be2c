"""Which arithmetic a device computes with, and in which type."""

from __future__ import annotations

import logging

import torch

from linker_core.config import MatmulPrecision
from linker_core.engine.arithmetic import Arithmetic
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.cpu.kernels import can_round
from linker_core.engine.cuda.arithmetic import CudaArithmetic
from linker_core.engine.cuda.graphs import GraphCapture
from linker_core.engine.torch_arithmetic import TorchArithmetic
from linker_core.residency.device import is_lack_of_memory

_log = logging.getLogger(__name__)


def arithmetic_for(device: torch.device, *, precision: MatmulPrecision = "highest") -> Arithmetic:
    """Returns the arithmetic of a device.

    Args:
        device: Where everything lies.
        precision: Of float32 products on a CPU, "highest" or "medium": see `EngineConfig`.
    """
    rounded = precision == "medium"
    if rounded and not (device.type == "cpu" and can_round()):
        _log.warning("matmul_precision medium changes nothing on this device")
    if device.type == "cpu":
        return CompiledArithmetic(rounded=rounded)
    if device.type == "cuda":
        return _cuda_arithmetic(device)
    return TorchArithmetic()


def _cuda_arithmetic(device: torch.device) -> CudaArithmetic:
    # Triton comes with torch's CUDA wheels; a machine without such a device does without it.
    from linker_core.engine.cuda.triton_kernels import TritonKernels  # noqa: PLC0415

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return CudaArithmetic(TritonKernels(num_processors=processors), GraphCapture())


def still_computes(device: torch.device) -> bool:
    """Whether a device computes anything at all; after some faults it never does again."""
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        if is_lack_of_memory(error):
            return True
        _log.exception("the device %s computes nothing any more", device)
        return False
    return True


def activation_dtype(device: torch.device) -> torch.dtype:
    """Returns the type of activations: float32 on the CPU, over the checkpoint's own words."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
