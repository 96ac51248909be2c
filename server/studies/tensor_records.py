"""What a study has found tensor by tensor, a few at a time.

Of many fine-tunes it is a hundred megabytes, which nobody need hold at once, or as objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from linker_core.weights.keys import parse_key
from server.registry.store import Registry

_AT_ONCE = 8


def read_records(registry: Registry, key: str) -> Iterator[Mapping[str, bytes]]:
    """Yields the stored records of a study, each as a line of JSON, in the order of the blocks.

    Blocking.

    Raises:
        NotReadyError: The registry cannot be read.
    """
    names = sorted(registry.study_tensors(key), key=_place)
    for start in range(0, len(names), _AT_ONCE):
        yield registry.study_records(key, names[start : start + _AT_ONCE])


def _place(name: str) -> tuple[int, str]:
    key = parse_key(name)
    return (-1 if key is None or key.layer is None else key.layer), name
