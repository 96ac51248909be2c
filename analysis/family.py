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

_BASE_PARAM = "base"
_VARIANT_PARAM = "variants.{}"


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
                the reason; `param` is the model's, see `params`.
        """
        if not variants:
            raise InvalidRequestError(
                "A study needs a base and at least one fine-tune of it; name both."
            )
        with ExitStack() as opened:
            root = opened.enter_context(_open(base, _BASE_PARAM))
            tuned = {
                name: opened.enter_context(_open(path, _VARIANT_PARAM.format(name)))
                for name, path in variants.items()
            }
            for name, checkpoint in tuned.items():
                try:
                    check_same_family(root.config, checkpoint.config)
                except LinkerError as error:
                    param = _VARIANT_PARAM.format(name)
                    raise _named(checkpoint.path, error, param) from error
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

    @property
    def params(self) -> tuple[str, ...]:
        """What errors call each of `checkpoints`: `base`, and `variants.NAME`."""
        return (_BASE_PARAM, *map(_VARIANT_PARAM.format, self.variants))

    def close(self) -> None:
        """Closes all files; harmless when repeated."""
        for checkpoint in self.checkpoints:
            checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _open(path: Path, param: str) -> Checkpoint:
    try:
        return Checkpoint.open(path)
    except LinkerError as error:
        raise _named(path, error, param) from error


def _named(path: Path, error: LinkerError, param: str) -> LinkerError:
    return from_record({"code": error.code, "message": f"{path}: {error.message}", "param": param})
