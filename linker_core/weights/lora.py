"""A LoRA adapter as PEFT writes it, opened without trust: which factors change which weight.

Legend: O rows and I width of the weight, r rank. The weight becomes W + scaling · B A with
A [r, I] and B [O, r]; an embedding [V, H] becomes W + scaling · (B A)ᵀ with A [r, V] and B [H, r].
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from linker_core.errors import BadCheckpointError, UnsupportedFormatError
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Identity, identity_of
from linker_core.weights.files import (
    open_directory,
    open_regular,
    read_at,
    read_json,
    refuse_foreign_formats,
)
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from linker_core.weights.lora_config import ADAPTER_CONFIG, LoraConfig
from linker_core.weights.safetensors_header import TensorInfo, read_header
from linker_core.weights.shapes import expected_tensors

ADAPTER_FILE: Final = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_HEADER_BASE_BYTES = 1 << 20
_HEADER_BYTES_PER_TENSOR = 1 << 10
_ROOT = "base_model.model."  # what PEFT puts before every name
_FACTOR = re.compile(
    r"(?P<module>[a-z0-9_.]+)\.lora_(?:(?P<linear>[AB])(?:\.default)?\.weight"
    r"|embedding_(?P<embedding>[AB])(?:\.default)?)"
)
_DORA = "lora_magnitude_vector"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """The factors of one weight."""

    a: TensorInfo  # [r, I]; of an embedding [r, V]
    b: TensorInfo  # [O, r]; of an embedding [H, r]
    scaling: float
    transposed: bool  # an embedding's: its rows come from A

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class LoraAdapter:
    """A validated adapter folder. Holds its file open until `close`; use it as a context manager.

    Attributes:
        path: The folder.
        pairs: Name of a weight -> its factors, in the order of a forward pass.
    """

    def __init__(self, path: Path, base: ModelConfig) -> None:
        self.path = path
        self._file = -1
        directory = open_directory(path)
        try:
            with os.scandir(directory) as entries:
                refuse_foreign_formats([entry.name for entry in entries])
            record = read_json(directory, ADAPTER_CONFIG, max_bytes=_MAX_CONFIG_BYTES)
            config = LoraConfig.parse(record)
            self._file = open_regular(directory, ADAPTER_FILE)
            self.pairs: Mapping[str, LoraPair] = MappingProxyType(self._read_pairs(config, base))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(directory)

    @classmethod
    def open(cls, path: Path | str, base: ModelConfig) -> Self:
        """Opens and validates a folder.

        Args:
            path: Of adapter_config.json and adapter_model.safetensors.
            base: Of the model whose weights the adapter changes.

        Raises:
            UnsupportedFormatError: Pickles, code, or an adapter of a kind that is not served.
            BadCheckpointError: Damaged files, or factors that do not fit the base.
        """
        return cls(Path(path), base)

    @property
    def identity(self) -> Identity:
        """What the weight file is now."""
        return identity_of([ADAPTER_FILE], [self._file])

    def read(self, factor: TensorInfo) -> bytearray:
        """Returns a factor's bytes.

        Raises:
            BadCheckpointError: The file became shorter, or the disk failed.
        """
        words = bytearray(factor.nbytes)
        what = f"{ADAPTER_FILE}: tensor {factor.name}"
        read_at(self._file, memoryview(words), position=factor.offset, what=what)
        return words

    def close(self) -> None:
        """Closes the file; harmless when repeated."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _read_pairs(self, config: LoraConfig, base: ModelConfig) -> dict[str, LoraPair]:
        shapes = expected_tensors(base)
        header = read_header(
            self._file,
            file=ADAPTER_FILE,
            shard=0,
            max_bytes=_HEADER_BASE_BYTES + _HEADER_BYTES_PER_TENSOR * len(shapes),
        )
        if not header.tensors:
            raise BadCheckpointError(f"{ADAPTER_FILE}: holds no factors. Save the adapter again.")
        if base.tie_word_embeddings:
            shapes.pop(EMBED_NAME)
        found = _by_module(header.tensors, base)
        unknown = [module for module in found if len(shapes.get(f"{module}.weight", ())) != 2]
        if unknown:
            raise BadCheckpointError(
                f"{ADAPTER_FILE}: changes {unknown[0]:.200}, which is no linear layer of the base. "
                "Name the base that the adapter was trained on."
            )
        return {
            name: _pair(module, found[module], shape, config)
            for name, shape in shapes.items()
            if (module := name.removesuffix(".weight")) in found
        }


def is_adapter(path: Path) -> bool:
    """Returns whether a folder holds an adapter, by the name of its config alone."""
    return os.path.lexists(path / ADAPTER_CONFIG)


def _by_module(
    tensors: Sequence[TensorInfo], base: ModelConfig
) -> dict[str, dict[str, TensorInfo]]:
    """Returns module -> {"A" or "B": factor}, in lower case for an embedding's.

    Raises:
        UnsupportedFormatError: A tensor that is no such factor.
        BadCheckpointError: A factor that is stored twice.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    for tensor in tensors:
        match = _FACTOR.fullmatch(tensor.name.removeprefix(_ROOT))
        if match is None or not tensor.name.startswith(_ROOT):
            what = (
                "DoRA is not served" if _DORA in tensor.name else "only LoRA's A and B are served"
            )
            raise UnsupportedFormatError(
                f"{ADAPTER_FILE}: has tensor {tensor.name:.200}; {what}. Merge the adapter into "
                "its base (PEFT's merge_and_unload) and onboard the checkpoint."
            )
        module = match["module"]
        if base.tie_word_embeddings and f"{module}.weight" in (EMBED_NAME, LM_HEAD_NAME):
            raise UnsupportedFormatError(
                f"{ADAPTER_FILE}: changes {module}, and the base ties embedding and head, which an "
                "adapter parts. Merge it into an untied copy of its base."
            )
        side = match["linear"] or match["embedding"].lower()
        pair = found.setdefault(module, {})
        if side in pair:
            raise BadCheckpointError(
                f"{ADAPTER_FILE}: has {tensor.name:.200} and {pair[side].name:.200}, the same "
                "factor twice. Save the adapter again."
            )
        pair[side] = tensor
    return found


def _pair(
    module: str, found: Mapping[str, TensorInfo], shape: tuple[int, ...], config: LoraConfig
) -> LoraPair:
    """Returns a module's factors, whose shapes fit the weight's."""
    transposed = "a" in found
    if found.keys() not in ({"A", "B"}, {"a", "b"}) or (
        transposed != (f"{module}.weight" == EMBED_NAME)
    ):
        raise BadCheckpointError(
            f"{ADAPTER_FILE}: of {module} it has {', '.join(t.name for t in found.values()):.300}, "
            "and one A and one B are needed. Save the adapter again."
        )
    a, b = (found["a"], found["b"]) if transposed else (found["A"], found["B"])
    rank = config.rank_of(module)
    rows, width = shape[::-1] if transposed else shape
    for factor, expected in ((a, (rank, width)), (b, (rows, rank))):
        if factor.shape != expected:
            raise BadCheckpointError(
                f"{ADAPTER_FILE}: tensor {factor.name:.200} is {list(factor.shape)}, the base and "
                f"{ADAPTER_CONFIG} ask for {list(expected)}. Name the base that the adapter was "
                "trained on."
            )
    return LoraPair(a=a, b=b, scaling=config.scaling_of(module), transposed=transposed)
