"""Where checkpoints may come from: directories inside the configured roots, after every link."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from linker_core.errors import ForbiddenSourceError, InvalidRequestError

_MAX_SOURCE_CHARS = 4096


def resolve_source(source: str, roots: Sequence[Path]) -> Path:
    """Returns the directory that a source means, every symbolic link followed.

    Args:
        source: An absolute path, or a path relative to the first root.
        roots: The directories that a source must be or lie in, once they are resolved too.

    Raises:
        InvalidRequestError: Not a path at all.
        ForbiddenSourceError: Outside every root. Whether something is there is not said.
    """
    if not source or "\0" in source or len(source) > _MAX_SOURCE_CHARS:
        raise InvalidRequestError("A source is the path of a model directory.", param="source")
    allowed = [root.resolve() for root in roots]
    try:
        path = (allowed[0] / source).resolve()  # an absolute source replaces the root
    except (IndexError, OSError, RuntimeError):  # no roots, a loop of links, too long a part
        path = None
    if path is not None and any(path.is_relative_to(root) for root in allowed):
        return path
    raise ForbiddenSourceError(
        "The source is not inside a directory this server may read models from. Move it under "
        "the models root, or name it when the server is started.",
        param="source",
    )
