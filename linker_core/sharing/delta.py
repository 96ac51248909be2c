"""A variant as a delta to its donor: a folder opened without trust, read like a checkpoint.

Everything but the data itself is checked at `open`; `delta_data` has what reads the data and what
holds it against a donor. The format is in docs/delta.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Self

from linker_core.errors import BadCheckpointError
from linker_core.sharing.delta_checks import check_entries, check_totals
from linker_core.sharing.delta_layout import DELTA_FILE, ITEM_BYTES
from linker_core.sharing.delta_plan import HEX_DIGEST, parse_plan
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint, Identity, identity_of
from linker_core.weights.files import open_directory, open_regular, read_at
from linker_core.weights.folder import read_settings
from linker_core.weights.safetensors_header import TensorInfo, read_header
from linker_core.weights.shapes import expected_tensors

FORMAT, VERSION = "linker-delta", "1"
_METADATA_KEYS = dict.fromkeys(("format", "version", "plan", "blake3")).keys()
# Honest headers take about 1 KiB a tensor, of seven entries and its line in the plan.
_HEADER_BASE_BYTES = 1 << 20
_HEADER_BYTES_PER_TENSOR = 2 << 10


class DeltaFile:
    """A validated delta folder. Holds its file open until `close`; use it as a context manager.

    Reads are thread-safe (`pread`). Attributes:
        path: The folder.
        config: Shape and arithmetic of the variant.
        plan: The rungs that the exporter chose; price and fingerprints are the exporter's claims.
        tensors: Name -> place, of every entry.
        eos_token_ids: Ids that end an answer, from config.json and generation_config.json.
        generation: Sampling defaults that generation_config.json states, within bounds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        directory = open_directory(path)
        try:
            names, settings = read_settings(directory)
            self.config: ModelConfig = settings.config
            self.eos_token_ids = settings.eos_token_ids
            self.generation = settings.generation
            _refuse_other_weights(names)
            self._file = open_regular(directory, DELTA_FILE)
            self._read_header()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(directory)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Opens and validates a folder; reads no data.

        Raises:
            UnsupportedFormatError: Pickles, custom code, another architecture or type.
            BadCheckpointError: Damaged or dishonest files; names what is wrong and the remedy.
        """
        return cls(Path(path))

    @property
    def nbytes(self) -> int:
        """Bytes of all entries; what a device holds of them."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def identity(self) -> Identity:
        """What the file is now."""
        return identity_of([DELTA_FILE], [self._file])

    @property
    def data_digest(self) -> str:
        """BLAKE3 of the data section, as the file states it."""
        return self._data_digest

    @property
    def fingerprint(self) -> str:
        """SHA-256 over config and header, the data's digest in it: true if `check_data` passes."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        head = memoryview(bytearray(self._data_start))
        read_at(self._file, head, position=0, what=f"{DELTA_FILE}: header")
        digest.update(b"\n" + head)
        return digest.hexdigest()

    def read_into(self, name: str, buffer: memoryview, *, offset_bytes: int = 0) -> None:
        """Fills a buffer with bytes of an entry.

        Args:
            name: A key of `tensors`.
            buffer: Writable, contiguous, one byte an item; its length says how much is read.
            offset_bytes: Where in the entry to begin.

        Raises:
            BadCheckpointError: The file became shorter, or the disk failed.
        """
        entry = self.tensors[name]
        assert 0 <= offset_bytes <= entry.nbytes - len(buffer)
        what = f"{DELTA_FILE}: tensor {name}"
        read_at(self._file, buffer, position=entry.offset + offset_bytes, what=what)

    def close(self) -> None:
        """Closes the file; harmless when repeated."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _read_header(self) -> None:
        shapes = expected_tensors(self.config)
        header = read_header(
            self._file,
            file=DELTA_FILE,
            shard=0,
            max_bytes=_HEADER_BASE_BYTES + _HEADER_BYTES_PER_TENSOR * len(shapes),
            item_bytes=ITEM_BYTES,
        )
        self._data_start = header.data_start
        plan, self._data_digest = _read_metadata(header.metadata)
        self.plan = parse_plan(
            plan,
            shapes=shapes,
            num_layers=self.config.num_layers,
            source=f"{DELTA_FILE}: plan",
        )
        found = {entry.name: entry for entry in header.tensors}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            check_entries(self.plan, shapes, found)
        )
        check_totals(self.plan, self, self.tensors)


def open_weights(path: Path | str) -> Checkpoint | DeltaFile:
    """Opens a folder as what it is: a delta if it holds one, else a checkpoint.

    Raises:
        LinkerError: See `DeltaFile.open` and `Checkpoint.open`.
    """
    return DeltaFile.open(path) if is_delta(Path(path)) else Checkpoint.open(path)


def is_delta(path: Path) -> bool:
    """Returns whether a folder holds a delta, by the name of its file alone."""
    return os.path.lexists(path / DELTA_FILE)


def _read_metadata(metadata: Mapping[str, str]) -> tuple[str, str]:
    """Returns the plan's text and the data's digest.

    Raises:
        BadCheckpointError: Another format or version, or a field too many or too few.
    """
    if metadata.get("format") != FORMAT:
        raise BadCheckpointError(
            f"{DELTA_FILE}: __metadata__ does not say that the format is {FORMAT}. Make deltas "
            "with `linker export`."
        )
    if (version := metadata.get("version")) != VERSION:
        raise BadCheckpointError(
            f"{DELTA_FILE}: is of version {version!r:.20}, and version {VERSION!r} is read. "
            "Export the variant again, or serve it with the linker that wrote it."
        )
    if metadata.keys() != _METADATA_KEYS:
        raise BadCheckpointError(
            f"{DELTA_FILE}: __metadata__ needs exactly the texts {', '.join(_METADATA_KEYS)}."
        )
    digest = metadata["blake3"]
    if not HEX_DIGEST.fullmatch(digest):
        raise BadCheckpointError(f"{DELTA_FILE}: blake3 is not 64 hexadecimal digits.")
    return metadata["plan"], digest


def _refuse_other_weights(names: list[str]) -> None:
    others = sorted(n for n in names if n.endswith(".safetensors") and n != DELTA_FILE)
    if others:
        raise BadCheckpointError(
            f"{others[0]:.100}: lies beside {DELTA_FILE}, so it is not clear what the folder is. "
            "Keep a delta and a checkpoint in folders of their own."
        )
