"""A parser of a subcommand that declares its arguments only once it is the one to parse them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


class DeferredParser(argparse.ArgumentParser):
    """What a subcommand takes is known to a module that is imported only if it is asked for.

    Args:
        declare: Adds the arguments; called once, before the first parsing.
        kwargs: As of `ArgumentParser`.
    """

    def __init__(
        self, *, declare: Callable[[argparse.ArgumentParser], None], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._declare: Callable[[argparse.ArgumentParser], None] | None = declare

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        if self._declare is not None:
            declare, self._declare = self._declare, None
            declare(self)
        return super().parse_known_args(args, namespace)
