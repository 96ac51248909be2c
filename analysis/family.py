"""A base and its fine-tunes, opened together: what every study of weights begins with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Self

from linker_core.errors import InvalidRequestError, LinkerError, from_record
from linker_core.sharing.family import check_same_family
from linker_core.weights.checkpoint import Checkpoint


class StudiedFamily:
    """Open, validated checkpoints of one family; a context manager that closes them.

    Attributes:
        base: The model the fine-tunes began from.
        variants: Name -> fine-tune, in the order in which they were given.
    """

    def __init__(self, base: Checkpoint, variants: Mapping[str, Checkpoint]) -> None:
        assert variants
        self.base = base
        self.variants = MappingProxyType(dict(variants))

    @classmethod
    def open(cls, base: Path, variants: Mapping[str, Path]) -> Self:
        """Opens and checks all checkpoints, or none.

        Args:
            base: Directory of the model the fine-tunes began from.
            variants: Name -> directory of a fine-tune.

        Raises:
            InvalidRequestError: There is no fine-tune.
            LinkerError: As `Checkpoint.open` and `check_same_family`, the directory named before
                the reason.
        """
        if not variants:
            raise InvalidRequestError(
                "A study needs a base and at least one fine-tune of it; name both."
            )
        with ExitStack() as opened:
            root = opened.enter_context(_open(base))
            tuned = {name: opened.enter_context(_open(path)) for name, path in variants.items()}
            for checkpoint in tuned.values():
                try:
                    check_same_family(root.config, checkpoint.config)
                except LinkerError as error:
                    raise _named(checkpoint.path, error) from error
            opened.pop_all()
        return cls(root, tuned)

    @property
    def names(self) -> tuple[str, ...]:
        """The fine-tunes' names, in their order."""
        return tuple(self.variants)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All models, the base first."""
        return (self.base, *self.variants.values())

    def close(self) -> None:
        """Closes all files; harmless when repeated."""
        for checkpoint in self.checkpoints:
            checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _open(path: Path) -> Checkpoint:
    try:
        return Checkpoint.open(path)
    except LinkerError as error:
        raise _named(path, error) from error


def _named(path: Path, error: LinkerError) -> LinkerError:
    return from_record(error.to_record() | {"message": f"{path}: {error.message}"})
