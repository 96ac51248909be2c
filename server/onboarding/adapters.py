"""LoRA adapters as sources: what can be said of one before there is a delta of it.

Blocking: what reads weights runs in a thread.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from linker_core.errors import BadCheckpointError, InvalidRequestError, LinkerError
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Identity, identity_of
from linker_core.weights.files import (
    open_directory,
    open_regular,
    read_json,
    refuse_foreign_formats,
)
from linker_core.weights.lora import ADAPTER_FILE, LoraAdapter
from linker_core.weights.lora_config import ADAPTER_CONFIG
from server.onboarding.pairs import files_changed
from server.residency.catalog import ServedModel, TextSide

_FILES = (ADAPTER_CONFIG, ADAPTER_FILE)
_MAX_CONFIG_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSide:
    """An adapter's folder. What fits it, and so what it is, shows with a base."""

    path: Path
    identity: Identity  # of the two files
    base_name: str | None  # what it says it was trained on


Source = TextSide | AdapterSide


def read_adapter(path: Path) -> AdapterSide:
    """Returns what an adapter's folder says of itself.

    Raises:
        UnsupportedFormatError: Weights that are not safetensors, or code.
        BadCheckpointError: A file that is missing, irregular or damaged.
    """
    with _opened(path) as (directory, files):
        record = read_json(directory, ADAPTER_CONFIG, max_bytes=_MAX_CONFIG_BYTES)
        base = record.get("base_model_name_or_path")
        return AdapterSide(
            path=path,
            identity=identity_of(_FILES, files),
            base_name=base if isinstance(base, str) and base else None,
        )


def choose_base(donors: Sequence[ServedModel], adapter: AdapterSide) -> ServedModel:
    """Returns the donor of an adapter that leaves it open: the only one that it fits.

    Of several it is the one that has the name of what the adapter was trained on.

    Raises:
        InvalidRequestError: None of them, or several.
        LinkerError: The one that it must have been trained on does not fit: why.
    """
    why = {donor.name: _why_unfit(adapter, donor.text.config) for donor in donors}
    fitting = [donor for donor in donors if why[donor.name] is None]
    meant = _meant(fitting, adapter.base_name)
    if meant is not None:
        return meant
    if not fitting and (meant := _meant(donors, adapter.base_name)) is not None:
        error = why[meant.name]
        assert error is not None
        raise error
    names = ", ".join(donor.name for donor in fitting) or "no resident one"
    raise InvalidRequestError(
        f"An adapter needs the donor it was trained on; of the donors it fits {names:.300}. "
        "Onboard its base as a donor, and name it.",
        param="donor",
    )


def _meant(donors: Sequence[ServedModel], base_name: str | None) -> ServedModel | None:
    """Returns the only one, or the only one that is called like an adapter's base."""
    named = donors if len(donors) == 1 else [d for d in donors if _is_called(d, base_name)]
    return named[0] if len(named) == 1 else None


def check_fit(adapter: AdapterSide, config: ModelConfig) -> None:
    """Refuses an adapter of another base.

    Raises:
        LinkerError: See `LoraAdapter.open`.
    """
    if (error := _why_unfit(adapter, config)) is not None:
        raise error


def adapter_digest(adapter: AdapterSide, donor_fingerprint: str) -> str:
    """Returns what the model is that an adapter makes of a donor; reads the adapter.

    Raises:
        BadCheckpointError: Its files changed, or cannot be read.
    """
    digest = hashlib.sha256(f"adapter\n{donor_fingerprint}".encode())
    with _opened(adapter.path) as (_, files):
        for descriptor in files:
            part = hashlib.sha256()
            while chunk := os.read(descriptor, _CHUNK_BYTES):
                part.update(chunk)
            digest.update(b"\n" + part.digest())
        if identity_of(_FILES, files) != adapter.identity:
            raise files_changed()
    return digest.hexdigest()


def check_unchanged(adapter: AdapterSide) -> None:
    """Refuses an adapter whose files were replaced since it was read.

    Raises:
        BadCheckpointError: They were.
    """
    with _opened(adapter.path) as (_, files):
        if identity_of(_FILES, files) != adapter.identity:
            raise files_changed()


def _why_unfit(adapter: AdapterSide, config: ModelConfig) -> LinkerError | None:
    try:
        with LoraAdapter.open(adapter.path, config):
            return None
    except LinkerError as error:
        return error


def _is_called(donor: ServedModel, base_name: str | None) -> bool:
    """Whether a donor's name, or its directory's, is the last part of what a base is called."""
    last = PurePosixPath(base_name or "").name
    return last in (PurePosixPath(donor.name).name, donor.text.path.name) and bool(last)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, list[int]]]:
    """Yields descriptors of a folder and of the two files in it.

    Raises:
        UnsupportedFormatError: The folder holds weights that are not safetensors, or code.
        BadCheckpointError: A file is missing or irregular, or the disk failed.
    """
    with ExitStack() as stack:
        directory = open_directory(path)
        stack.callback(os.close, directory)
        with os.scandir(directory) as entries:
            refuse_foreign_formats([entry.name for entry in entries])
        files = []
        for name in _FILES:
            files.append(open_regular(directory, name))
            stack.callback(os.close, files[-1])
        try:
            yield directory, files
        except OSError as error:
            raise BadCheckpointError(
                f"The adapter cannot be read: {os.strerror(error.errno or 0)}."
            ) from error
