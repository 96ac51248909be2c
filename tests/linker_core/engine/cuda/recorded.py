"""A stand-in for CUDA graphs: notes torch's operations down with their tensors, and repeats them.

Like a graph it knows addresses and launch arguments alone: host values are those of the capture, a
tensor is what lies where it lay, and whatever asks a tensor for a number cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ASK_THE_DEVICE = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class Recorder:
    """A `Capture`.

    Attributes:
        num_captures: So far.
        num_replays: So far.
    """

    def __init__(self) -> None:
        self.num_captures = self.num_replays = self.num_forgotten = 0

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1
        mode = Noting()
        with mode:
            body()
        calls = mode.calls
        assert calls
        mode.undo()

        def replay() -> None:
            self.num_replays += 1
            for function, args, kwargs, outs in calls:
                for new, out in zip(_tensors(function(*args, **kwargs)), outs, strict=True):
                    if new is not out:
                        out.copy_(new)

        return replay

    def forget(self) -> None:
        self.num_forgotten += 1


class Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation down, and refuses those that wait for the device.

    Attributes:
        calls: Operation, arguments, and the tensors that came out.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        assert func._schema.name not in _ASK_THE_DEVICE, f"{func} waits for the device"
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = (
                    storage,
                    storage.clone(),  # type: ignore[no-untyped-call]
                )
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, _tensors(out)))
        return out

    def undo(self) -> None:
        """Puts back what every tensor held before it was first used."""
        for storage, before in self._before.values():
            storage.copy_(before)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
