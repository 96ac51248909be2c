"""Sign-and-norm alignment of a kernel to another family (FM §3.5). Pure functions of one tensor.

FM: "sign alignment (flipping the kernel direction where the source and target mean deltas are
anti-correlated) and norm scaling (matching the L2 norm of the source kernel to the target's mean
delta magnitude)". Signs and norms here are of whole tensors: an alignment by element would replace
the source's direction by the target's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How a tensor's source kernel is brought into the target's space."""

    cos: float  # between the source kernel and the target's mean delta; 0 where one is zero
    flipped: bool  # whether they are anti-correlated
    source_norm: float  # of the kernel as it came
    target_norm: float  # of the target's mean delta

    @property
    def factor(self) -> float:
        """What the kernel is multiplied by; 0 where there is nothing to scale."""
        if self.source_norm == 0:
            return 0.0
        size = self.target_norm / self.source_norm
        return -size if self.flipped else size


def alignment(kernel: NDArray[np.float32], target_mean: NDArray[np.float32]) -> Alignment:
    """Returns how a source kernel K is aligned with the target's mean delta M.

    K' = s · (‖M‖ / ‖K‖) · K with s = -1 where <K, M> < 0, else 1. FM takes s from the source's
    mean delta; K is that times a weight w_t >= 0, so the sign is the same. The norm of K, and with
    it w_t, leaves K' altogether.

    Args:
        kernel: The source's, of one tensor.
        target_mean: Of the same shape.
    """
    assert kernel.shape == target_mean.shape
    source = kernel.ravel().astype(np.float64)
    target = target_mean.ravel().astype(np.float64)
    source_norm, target_norm = (float(np.sqrt(v @ v)) for v in (source, target))
    product = float(source @ target)
    size = source_norm * target_norm
    return Alignment(
        cos=product / size if size else 0.0,
        flipped=product < 0,
        source_norm=source_norm,
        target_norm=target_norm,
    )


def aligned(kernel: NDArray[np.float32], found: Alignment) -> NDArray[np.float32]:
    """Returns the kernel, turned and scaled."""
    values: NDArray[np.float32] = kernel * np.float32(found.factor)
    return values
