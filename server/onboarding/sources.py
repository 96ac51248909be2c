"""Where checkpoints may come from: directories inside the configured roots, after every link."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from linker_core.errors import ForbiddenSource, InvalidRequest

_MAX_SOURCE_CHARS = 4096


def resolve_source(source: str, roots: Sequence[Path]) -> Path:
    """Returns the directory that a source means, every symbolic link followed.

    Args:
        source: An absolute path, or a path relative to one of the roots.
        roots: The directories, themselves resolved here, that a source must be or lie in.

    Raises:
        InvalidRequest: Not a path at all.
        ForbiddenSource: Outside every root. Whether something is there is not said.
    """
    if not source or "\0" in source or len(source) > _MAX_SOURCE_CHARS:
        raise InvalidRequest("A source is the path of a model directory.", param="source")
    allowed = [root.resolve() for root in roots]
    inside: list[Path] = []
    for root in allowed:
        try:
            path = (root / source).resolve()  # an absolute source replaces the root
        except (OSError, RuntimeError):  # a loop of links, or a part of the path is too long
            continue
        if any(path.is_relative_to(other) for other in allowed):
            inside.append(path)
    if inside:
        return next((path for path in inside if path.exists()), inside[0])
    raise ForbiddenSource(
        "The source is not inside a directory this server may read models from. Move it under "
        "the models root, or name it when the server is started.",
        param="source",
    )
