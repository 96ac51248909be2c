"""One pass over a base and its fine-tunes: every inner product that the studies need (FM Eq. 1).

PCA, cosines, norms and consensus weights are functions of the Gram matrix of the deltas, so the
weights are read once, and memory depends on neither the models' size nor the tensors'.

Legend: N fine-tunes, C runs of elements, D elements of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis.family import StudiedFamily
from analysis.gram_sweep import Sums, sweep_tensors
from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.pace import Pace
from linker_core.sharing.sweep import Progress
from linker_core.weights.checkpoint import Checkpoint

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGram:
    """The inner products of one tensor's deltas Δ_i = W_i - W_B (FM Eq. 1), in float64.

    Attributes:
        name: The tensor's.
        shape: As stored.
        base_square: |W_B|².
        base_dots_N: <W_B, Δ_i>.
        groups_CNN: <Δ_i, Δ_j> over contiguous runs of elements, at most 64 and of 256 elements or
            more where the tensor has as many; only the last may be shorter than the others.
        dtypes: Types as stored, the base's first.
    """

    name: str
    shape: tuple[int, ...]
    base_square: float
    base_dots_N: Floats
    groups_CNN: Floats
    dtypes: tuple[str, ...]

    @property
    def gram_NN(self) -> Floats:  # noqa: N802 - its shape
        """<Δ_i, Δ_j> over the whole tensor."""
        total: Floats = self.groups_CNN.sum(axis=0)
        return total

    @property
    def norms_N(self) -> Floats:  # noqa: N802 - its shape
        """|Δ_i|."""
        return np.sqrt(np.diagonal(self.gram_NN))


def gram_pass(
    family: StudiedFamily,
    names: Sequence[str],
    *,
    mapped: bool = False,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> Iterator[TensorGram]:
    """Yields the Gram matrix of each tensor's deltas, in the order of `names`, as it is known.

    All cores read; the order of summation, and so every bit of the result, depends on neither their
    number nor their speed. Whoever stops early closes the iterator, which ends the threads.

    Args:
        family: Open checkpoints.
        names: Tensors of the base, from `select`.
        mapped: Read the files through maps, faster: a file that is cut short then ends this
            process.
        pace: Holds back while sequences run.
        progress: Called from several threads with bytes read and bytes to read.

    Raises:
        InvalidRequestError: A fine-tune lacks a tensor, or has it in another shape.
        BadCheckpointError: NaN or infinite weights, or a file that changed; raised as the tensor is
            reached.
    """
    for name in names:
        _check_comparable(family, name)
    return _grams(
        family,
        sweep_tensors(
            family.checkpoints, names, mapped=mapped, pace=pace or Pace(), progress=progress
        ),
    )


def _grams(family: StudiedFamily, swept: Iterator[Sums]) -> Iterator[TensorGram]:
    for sums in swept:
        _refuse_nonfinite(family, sums)
        total_MM = sums.products_CMM.sum(axis=0)
        yield TensorGram(
            name=sums.name,
            shape=family.base.tensors[sums.name].shape,
            base_square=float(total_MM[0, 0]),
            base_dots_N=total_MM[0, 1:].copy(),
            groups_CNN=np.ascontiguousarray(sums.products_CMM[:, 1:, 1:]),
            dtypes=tuple(model.tensors[sums.name].dtype for model in family.checkpoints),
        )


def _check_comparable(family: StudiedFamily, name: str) -> None:
    shape = family.base.tensors[name].shape
    for model, checkpoint in family.variants.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.shape != shape:
            held = "does not have it" if tensor is None else f"has it as {list(tensor.shape)}"
            raise InvalidRequestError(
                f"{name} is {list(shape)} in the base; {model} {held}, so it has no delta there. "
                "Leave the tensor out.",
                param="tensors",
            )


def _refuse_nonfinite(family: StudiedFamily, sums: Sums) -> None:
    """Refuses weights that are NaN or infinite: they show in squares, finite ones cannot overflow.

    Raises:
        BadCheckpointError: Names the first model, the base before the others.
    """
    squares_CM = np.diagonal(sums.products_CMM, axis1=1, axis2=2)
    models = zip(family.checkpoints, family.params, strict=True)
    for number, (checkpoint, param) in enumerate(models):
        if not np.isfinite(squares_CM[:, number]).all():
            raise BadCheckpointError(
                f"{checkpoint.path}: {_file_of(checkpoint, sums.name)}: tensor {sums.name} has NaN "
                "or infinite weights. The training run that wrote it diverged; export an earlier "
                "step.",
                param=param,
            )


def _file_of(checkpoint: Checkpoint, name: str) -> str:
    return checkpoint.shard_names[checkpoint.tensors[name].shard]
