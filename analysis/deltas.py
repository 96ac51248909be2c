"""Deltas put on a model's weights, and noise of the same size to compare them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.model import StudyModel
from analysis.tensors import out_of_range

DeltaOf = Callable[[str], NDArray[np.float32]]  # tensor's name -> what is added to it


def add_deltas(model: StudyModel, names: Iterable[str], delta_of: DeltaOf) -> float:
    """Adds to the weights that a model has now; one tensor's delta exists at a time.

    Returns:
        The norm of all deltas together, before they are rounded to the model's type.

    Raises:
        InvalidRequestError: A sum leaves the range of the model's type.
    """
    square = 0.0
    for name in names:
        with np.errstate(over="ignore", invalid="ignore"):  # `check_range` says it better
            delta = delta_of(name)
            square += float(np.square(delta, dtype=np.float64).sum())
        model.put(name, model.get(name).cpu() + torch.from_numpy(delta))
        check_range(model, name)
    return math.sqrt(square)


def check_range(model: StudyModel, name: str) -> None:
    """Refuses a tensor that something was added to, if not all of it is finite any more.

    Raises:
        InvalidRequestError: See above.
    """
    values = model.get(name)
    if not torch.isfinite(values).all():
        remedy = "Give a smaller scale"
        if values.dtype is not torch.float32:
            remedy += ", or --dtype float32"
        raise out_of_range(name, str(values.dtype).removeprefix("torch."), remedy=remedy)


def noise_like(delta: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """Returns a delta in a uniformly random direction, of the shape and the norm of another."""
    values = generator.standard_normal(delta.shape)
    size = np.linalg.norm(delta.astype(np.float64)) / np.linalg.norm(values)
    return (size * values).astype(np.float32)


def shuffled(delta: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """Returns a delta with its rows and its columns in random orders: same values, same spectrum.

    What is left of its effect needs no correspondence between its coordinates and the model's.
    """
    orders = [generator.permutation(size) for size in delta.shape]
    moved: NDArray[np.float32] = delta[np.ix_(*orders)]
    return moved
