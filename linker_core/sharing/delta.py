"""A variant as a delta to its donor: a folder opened without trust, read like a checkpoint.

Everything but the data itself is checked at `open`; `verify` reads the data. The donor is another
file, so what must fit it is checked by `check_donor`. The format is in docs/delta.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from linker_core.errors import BadCheckpointError
from linker_core.sharing.delta_layout import (
    CODES_TYPE,
    DELTA_FILE,
    POSITIONS_TYPE,
    deciding_entry,
    entries_of,
)
from linker_core.sharing.delta_plan import parse_plan
from linker_core.sharing.plan import SharePlan, count_blocks
from linker_core.sharing.rungs import AnyRung, Residual, kind_of
from linker_core.weights.architecture import CONFIG_FILE, ModelConfig
from linker_core.weights.checkpoint import Checkpoint, Identity, identity_of
from linker_core.weights.files import open_directory, open_regular, read_at
from linker_core.weights.folder import read_settings
from linker_core.weights.safetensors_header import FLOATS, Header, TensorInfo, read_header
from linker_core.weights.shapes import expected_tensors

FORMAT, VERSION = "linker-delta", "1"
ITEM_BYTES: Final = MappingProxyType({**FLOATS, CODES_TYPE: 1, POSITIONS_TYPE: 8})
_METADATA_KEYS = {"format", "version", "plan", "blake3"}
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
# Honest headers take about 1 KiB a tensor, of seven entries and its line in the plan.
_HEADER_BASE_BYTES = 1 << 20
_HEADER_BYTES_PER_TENSOR = 2 << 10
_PLAN = f"{DELTA_FILE}: plan"


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
            self._shapes = expected_tensors(self.config)
            header = self._read_header()
            self.plan = self._read_plan(header)
            self.tensors: Mapping[str, TensorInfo] = self._checked_entries(header)
            self._check_totals()
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
    def data_start(self) -> int:
        """Bytes before the data section."""
        return self._data_start

    @property
    def data_digest(self) -> str:
        """BLAKE3 of the data section, as the file states it."""
        return self._data_digest

    @property
    def fingerprint(self) -> str:
        """SHA-256 over config and header, in which the data's digest is; true after `verify`."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        head = memoryview(bytearray(self._data_start))
        read_at(self._file, head, position=0, what=f"{DELTA_FILE}: header")
        digest.update(b"\n" + head)
        return digest.hexdigest()

    def extra_rows(self, name: str) -> int:
        """Returns how many rows of a tensor on a residual rung the donor lacks."""
        return self.tensors[f"{name}.extra"].shape[0]

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

    def _read_header(self) -> Header:
        return read_header(
            self._file,
            file=DELTA_FILE,
            shard=0,
            max_bytes=_HEADER_BASE_BYTES + _HEADER_BYTES_PER_TENSOR * len(self._shapes),
            item_bytes=ITEM_BYTES,
        )

    def _read_plan(self, header: Header) -> SharePlan:
        """Reads `__metadata__`."""
        metadata = header.metadata
        if metadata.get("format") != FORMAT:
            raise BadCheckpointError(
                f"{DELTA_FILE}: __metadata__ does not say that the format is {FORMAT}. Export the "
                "variant with `linker export`."
            )
        if (version := metadata.get("version")) != VERSION:
            raise BadCheckpointError(
                f"{DELTA_FILE}: is of version {version!r:.20}, and version {VERSION!r} is read. "
                "Export the variant again, or serve it with the linker that wrote it."
            )
        digest, plan = metadata.get("blake3"), metadata.get("plan")
        if metadata.keys() != _METADATA_KEYS or not isinstance(plan, str):
            raise BadCheckpointError(
                f"{DELTA_FILE}: __metadata__ needs exactly the texts {sorted(_METADATA_KEYS)}."
            )
        if not isinstance(digest, str) or not _HEX_DIGEST.fullmatch(digest):
            raise BadCheckpointError(f"{DELTA_FILE}: blake3 is not 64 hexadecimal digits.")
        self._data_start, self._data_digest = header.data_start, digest
        return parse_plan(
            plan, shapes=self._shapes, num_layers=self.config.num_layers, source=_PLAN
        )

    def _checked_entries(self, header: Header) -> Mapping[str, TensorInfo]:
        """Returns the entries; they are exactly those that the plan's rungs ask for."""
        found = {entry.name: entry for entry in header.tensors}
        expected = {
            entry.name: entry
            for name, rung in self.plan.rungs.items()
            for entry in entries_of(
                name,
                rung,
                self._shapes[name],
                _own_type(name, rung, found),
                num_rows=self._rows_as_they_are(name, rung, found),
            )
        }
        if odd := sorted(found.keys() ^ expected.keys()):
            state = "is missing" if odd[0] in expected else "is not part of the plan"
            raise BadCheckpointError(
                f"{DELTA_FILE}: entry {odd[0]:.200} {state} ({len(odd)} such). Export again."
            )
        for name, entry in expected.items():
            if (found[name].dtype, found[name].shape) != (entry.dtype, entry.shape):
                raise BadCheckpointError(
                    f"{DELTA_FILE}: entry {name} is {found[name].dtype} "
                    f"{list(found[name].shape)}, the plan asks for {entry.dtype} "
                    f"{list(entry.shape)}. Export again."
                )
        return MappingProxyType({name: found[name] for name in expected})

    def _rows_as_they_are(self, name: str, rung: AnyRung, found: Mapping[str, TensorInfo]) -> int:
        if not isinstance(rung, Residual):
            return self.plan.own_rows.get(name, 0)
        extra = found.get(f"{name}.extra")
        num_rows = extra.shape[0] if extra is not None and extra.shape else 0
        if num_rows > self._shapes[name][0] - max(1, rung.rank):
            raise BadCheckpointError(
                f"{DELTA_FILE}: entry {name}.extra has {num_rows} rows, which leaves too few of "
                f"{self._shapes[name][0]} for rung {rung}. Export again."
            )
        return num_rows

    def _check_totals(self) -> None:
        """Compares the plan's numbers with those of the entries.

        The donor's types are unknown here, so what it lends is known only within a factor of two.
        """
        known = lent_weights = 0
        by_kind: dict[str, int] = {}
        for name, rung in self.plan.rungs.items():
            weights = math.prod(self._shapes[name])
            deciding = deciding_entry(name, rung)
            if deciding is None:
                lent_weights += weights
                unique = 0
            else:
                dtype = self.tensors[deciding].dtype
                known += weights * ITEM_BYTES[dtype]
                num_rows = self._rows_as_they_are(name, rung, self.tensors)
                entries = entries_of(name, rung, self._shapes[name], dtype, num_rows=num_rows)
                unique = sum(self.tensors[entry.name].nbytes for entry in entries)
            by_kind[kind_of(rung)] = by_kind.get(kind_of(rung), 0) + unique
        plan = self.plan
        low, high = known + 2 * lent_weights, known + 4 * lent_weights
        blocks = count_blocks(plan.rungs, self)
        sound = {
            "rung_bytes": plan.rung_bytes == by_kind,
            "unique_bytes": plan.unique_bytes == sum(by_kind.values()),
            "logical_bytes": low <= plan.logical_bytes <= high,
            "checkpoint_bytes": low <= plan.checkpoint_bytes <= high,
            "blocks": plan.blocks == blocks,
        }
        for key, agrees in sound.items():
            if not agrees:
                raise BadCheckpointError(
                    f"{_PLAN}: {key} is {getattr(plan, key)!r:.100}, which the file's entries and "
                    f"{CONFIG_FILE} contradict. Export again."
                )


def open_weights(path: Path | str) -> Checkpoint | DeltaFile:
    """Opens a folder as what it is: a delta if it holds one, else a checkpoint.

    Raises:
        LinkerError: See `DeltaFile.open` and `Checkpoint.open`.
    """
    return DeltaFile.open(path) if is_delta(Path(path)) else Checkpoint.open(path)


def is_delta(path: Path) -> bool:
    """Returns whether a folder holds a delta, by the name of its file alone."""
    return os.path.lexists(path / DELTA_FILE)


def _refuse_other_weights(names: list[str]) -> None:
    others = sorted(n for n in names if n.endswith(".safetensors") and n != DELTA_FILE)
    if others:
        raise BadCheckpointError(
            f"{others[0]:.100}: lies beside {DELTA_FILE}, so it is not clear what the folder is. "
            "Keep a delta and a checkpoint in folders of their own."
        )


def _own_type(name: str, rung: AnyRung, found: Mapping[str, TensorInfo]) -> str:
    """Returns the variant's type of a tensor; any other than a float is refused with the entry."""
    deciding = deciding_entry(name, rung)
    entry = None if deciding is None else found.get(deciding)
    if entry is None or entry.dtype not in FLOATS:
        return next(iter(FLOATS))
    return entry.dtype
