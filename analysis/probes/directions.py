"""The direction in which a model's activations differ between two sets of prompts.

As Arditi et al. (2024) find the refusal direction: the difference of the means of the residual
stream at a prompt's last token, at one layer.
Legend: P prompts, H hidden width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError

SEARCHED = 0.8  # Arditi et al. search the first 80 % of the layers


class Direction(NamedTuple):
    """Where two sets of prompts part."""

    unit_H: NDArray[np.float64]
    layer: int  # behind which the residual stream was read
    separation: float  # distance of the means along it, in standard deviations within a set


@torch.no_grad()
def last_activations(model: StudyModel, prompts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Returns the residual stream behind every layer at each prompt's last token, [P, L, H]."""
    states = []
    body = model.module.get_submodule("model")
    for ids in prompts:
        output = body(
            torch.tensor([list(ids)], device=model.device),
            output_hidden_states=True,
            use_cache=False,
        )
        # The first is the embedding, and the last comes from behind the final norm.
        states.append(torch.stack([state[0, -1] for state in output.hidden_states[1:-1]]))
    return torch.stack(states).double().cpu().numpy()


def check_layer(layer: int | None, num_layers: int) -> None:
    """Refuses a layer that a model does not have.

    Raises:
        InvalidRequestError: See above.
    """
    if layer is not None and not 0 <= layer < num_layers:
        raise InvalidRequestError(
            f"--layer is {layer}, expected 0 to {num_layers - 1}.", param="layer"
        )


def difference_of_means(
    one_PLH: NDArray[np.float64], other_PLH: NDArray[np.float64], *, layer: int | None = None
) -> Direction:
    """Returns the unit vector from the second set's mean to the first's.

    Args:
        one_PLH: Of `last_activations`.
        other_PLH: Of the same model.
        layer: Which; None takes the one of the first 80 % whose means are farthest apart, in
            standard deviations within the sets along the direction between them.

    Raises:
        InvalidRequestError: No such layer, or the two means are equal.
    """
    num_layers = one_PLH.shape[1]
    check_layer(layer, num_layers)
    layers = range(max(1, round(SEARCHED * num_layers))) if layer is None else (layer,)
    found = [_direction(one_PLH[:, i], other_PLH[:, i], i) for i in layers]
    known = [direction for direction in found if direction is not None]
    if not known:
        raise InvalidRequestError(
            "Both sets of prompts have the same mean activations. Give prompts that differ."
        )
    return max(known, key=lambda direction: direction.separation)


def _direction(
    one_PH: NDArray[np.float64], other_PH: NDArray[np.float64], layer: int
) -> Direction | None:
    difference_H = one_PH.mean(axis=0) - other_PH.mean(axis=0)
    length = float(np.linalg.norm(difference_H))
    if length == 0:
        return None
    unit_H = difference_H / length
    along = (one_PH @ unit_H, other_PH @ unit_H)
    within = float(np.sqrt(np.mean([part.var(ddof=1) for part in along])))
    return Direction(unit_H, layer, length / within if within > 0 else float("inf"))
