"""A kernel put on a model in memory: W_B + alpha K (FM Eq. 5)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from analysis.deltas import check_range
from analysis.family import StudiedFamily
from analysis.kernel.apply import kernel_runs
from analysis.kernel.combination import Combination
from analysis.model import StudyModel


def put_kernel(
    model: StudyModel,
    family: StudiedFamily,
    kernel: Combination,
    *,
    scale: float,
    names: Iterable[str] | None = None,
) -> None:
    """Gives a model the base's weights plus scale · K, rounded only to the model's own type.

    Args:
        model: Of the family; what it held in these tensors is forgotten.
        family: Holds the kernel's base and fine-tunes, open.
        kernel: Of this family.
        scale: FM's alpha.
        names: Tensors of the kernel; all by default.

    Raises:
        BadCheckpointError: A file changed.
        InvalidRequestError: A sum leaves the range of the model's type.
    """
    for name in kernel.tensors if names is None else names:
        target_D = model.get(name).view(-1)
        start = 0
        for base_D, kernel_D in kernel_runs(family, kernel, name):
            values_D = torch.from_numpy(base_D + scale * kernel_D)
            target_D[start : start + len(values_D)].copy_(values_D)
            start += len(values_D)
        check_range(model, name)
