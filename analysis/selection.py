"""Which tensors a study looks at: FM's seven projections of every layer, or what globs name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from enum import StrEnum
from fnmatch import fnmatchcase

from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import parse_key

_NEAR_NAMES = 3


class Component(StrEnum):
    """FM's seven projections of a layer."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741 - the projection's name
    GATE = "gate"
    UP = "up"
    DOWN = "down"

    @property
    def is_attention(self) -> bool:
        """Whether it is one of the attention's four; the other three are the MLP's."""
        return self in _ATTENTION


_ATTENTION = frozenset({Component.Q, Component.K, Component.V, Component.O})
_COMPONENTS = {
    f"{'self_attn' if component in _ATTENTION else 'mlp'}.{component}_proj.weight": component
    for component in Component
}


def component_of(name: str) -> Component | None:
    """Returns which projection a tensor is, or None for norms, biases and what is no block's."""
    key = parse_key(name)
    return None if key is None else _COMPONENTS.get(key.parameter)


def layer_of(name: str) -> int | None:
    """Returns the layer that a tensor belongs to, or None outside the blocks."""
    key = parse_key(name)
    return None if key is None else key.layer


def select(checkpoint: Checkpoint, globs: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns names of tensors, in the checkpoint's order.

    Args:
        checkpoint: Whose tensors; the base's.
        globs: Patterns as of a shell (`model.layers.0.*`); none means FM's seven projections.

    Raises:
        InvalidRequestError: A glob matches nothing; names near it are given.
    """
    if not globs:
        return tuple(name for name in checkpoint.tensors if component_of(name) is not None)
    chosen: set[str] = set()
    for glob in globs:
        matches = [name for name in checkpoint.tensors if fnmatchcase(name, glob)]
        if not matches:
            raise InvalidRequestError(_no_match(glob, list(checkpoint.tensors)), param="tensors")
        chosen.update(matches)
    return tuple(name for name in checkpoint.tensors if name in chosen)


def _no_match(glob: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(glob, names, n=_NEAR_NAMES, cutoff=0.0)
    return f"No tensor is called {glob!r}. Near it are {', '.join(near)}; * stands for any text."
