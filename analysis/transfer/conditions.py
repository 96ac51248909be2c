"""FM's eight conditions: no kernel, a family's own, or another family's on a base (FM table 5).

The target's base is what a kernel is brought to; the other family is the source. Knows no metric:
whoever runs the conditions says what is measured of a model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from analysis.deltas import DeltaOf, add_deltas, noise_like, shuffled
from analysis.model import StudyModel
from analysis.selection import component_of
from analysis.transfer.alignment import aligned, alignment
from analysis.transfer.side import Side
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint

Measured = TypeVar("Measured")


class Part(StrEnum):
    """Which projections a kernel is put on."""

    ALL = "all"
    ATTENTION = "attention"
    MLP = "mlp"

    def holds(self, name: str) -> bool:
        """Says whether a tensor is of the part; of ALL every tensor is."""
        if self is Part.ALL:
            return True
        component = component_of(name)
        return component is not None and component.is_attention is (self is Part.ATTENTION)


class Form(StrEnum):
    """What is made of a kernel before it is added."""

    RAW = "raw"  # as it is
    ALIGNED = "sign-norm"  # FM §3.5
    SHUFFLED = "shuffled"  # rows and columns of each tensor in random orders
    NOISE = "noise"  # a random direction of the kernel's norm, tensor by tensor
    ALIGNED_NOISE = "sign-norm noise"  # the same of the aligned kernel's


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One row of FM's table 5, or one that FM does not have."""

    key: str
    on_target: bool = True  # whose base is measured: the target's or the source's
    crossed: bool | None = None  # whether the other family's kernel is added; None: no kernel
    part: Part = Part.ALL
    form: Form = Form.RAW

    def title(self, *, target: str, source: str) -> str:
        """Returns what the condition is, in the families' names."""
        own, other = (target, source) if self.on_target else (source, target)
        if self.crossed is None:
            return f"{own} base"
        kernel = f"{other} → {own}" if self.crossed else f"{own} self-kernel"
        notes: list[str] = [] if self.part is Part.ALL else [self.part]
        notes += [] if self.form is Form.RAW else [self.form]
        return f"{kernel} ({', '.join(notes)})" if notes else kernel


FM_CONDITIONS: Final = (
    Condition(key="C0"),
    Condition(key="C1", crossed=False),
    Condition(key="C2", crossed=True),
    Condition(key="C3", crossed=True, part=Part.ATTENTION),
    Condition(key="C4", crossed=True, part=Part.MLP),
    Condition(key="C5", crossed=True, form=Form.ALIGNED),
    Condition(key="C6", on_target=False),
    Condition(key="C7", on_target=False, crossed=True),
)
# FM aligns no part alone, and compares no transfer with what its size and its spectrum do by
# themselves, which tells what the direction is worth.
BEYOND_FM: Final = (
    Condition(key="A3", crossed=True, part=Part.ATTENTION, form=Form.ALIGNED),
    Condition(key="A4", crossed=True, part=Part.MLP, form=Form.ALIGNED),
    Condition(key="S2", crossed=True, form=Form.SHUFFLED),
    Condition(key="N1", crossed=False, form=Form.NOISE),
    Condition(key="N2", crossed=True, form=Form.NOISE),
    Condition(key="N5", crossed=True, form=Form.ALIGNED_NOISE),
)


class Outcome(NamedTuple, Generic[Measured]):
    """What was measured under a condition."""

    norm: float  # of all that was added
    measured: Measured


def matching_tensors(
    target: Checkpoint, source: Checkpoint, names: Iterable[str]
) -> tuple[str, ...]:
    """Returns the tensors that both families have in one shape.

    Raises:
        InvalidRequestError: There is none.
    """
    chosen = tuple(names)
    found = tuple(
        name
        for name in chosen
        if name in source.tensors and source.tensors[name].shape == target.tensors[name].shape
    )
    if not found:
        raise InvalidRequestError(
            f"{source.path.name} has none of {target.path.name}'s {len(chosen)} tensors in the "
            "same shape. A kernel transfers between families of equal projection shapes: the "
            "same width, heads and MLP."
        )
    return found


def delta_of(
    condition: Condition, *, own: Side, other: Side, alpha: float = 1.0, seed: int = 0
) -> DeltaOf:
    """Returns what a condition adds to each tensor of the base it is measured on.

    Args:
        condition: One with a kernel.
        own: Of the family whose base it is.
        other: The other family.
        alpha: FM Eq. 5's scale, after alignment.
        seed: Of noise, of which every key has a stream of its own; tensors must then be asked for
            in one order.
    """
    assert condition.crossed is not None
    kernel_of = other.kernel_of if condition.crossed else own.kernel_of
    # By its name: a condition has the same draw whichever others are measured beside it.
    generator = np.random.default_rng([seed, zlib.crc32(condition.key.encode())])

    def scaled(name: str) -> NDArray[np.float32]:
        delta = kernel_of(name)
        if condition.form in (Form.ALIGNED, Form.ALIGNED_NOISE):
            delta = aligned(delta, alignment(delta, own.mean_of(name)))
        if condition.form is Form.SHUFFLED:
            delta = shuffled(delta, generator)
        if condition.form in (Form.NOISE, Form.ALIGNED_NOISE):
            delta = noise_like(delta, generator)
        return delta * np.float32(alpha)

    return scaled


def measure_conditions(
    conditions: Sequence[Condition],
    model: StudyModel,
    measure: Callable[[StudyModel], Measured],
    *,
    own: Side,
    other: Side,
    names: Sequence[str],
    alpha: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[str, Outcome[Measured]]]:
    """Yields the key of each condition and what was measured, on one family's base.

    The model has its own weights again after each.

    Args:
        conditions: Of one base.
        model: That base.
        measure: What is wanted of it.
        own: Its family's side.
        other: The other family's.
        names: Tensors that both have; see `matching_tensors`.
        alpha: FM Eq. 5's scale.
        seed: See `delta_of`.
    """
    for condition in conditions:
        changed = [name for name in names if condition.part.holds(name)]
        norm = 0.0
        if condition.crossed is not None:
            put = delta_of(condition, own=own, other=other, alpha=alpha, seed=seed)
            norm = add_deltas(model, changed, put)
        outcome = Outcome(norm, measure(model))
        model.restore(changed)
        yield condition.key, outcome
