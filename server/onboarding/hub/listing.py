"""Which files of a repository are a model's, and how each is known to be the right one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from huggingface_hub.hf_api import RepoSibling

from linker_core.errors import BadCheckpointError, UnsupportedFormatError
from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.text.files import TEMPLATE_FILE, TOKENIZER_FILE
from linker_core.weights.architecture import CONFIG_FILE
from linker_core.weights.files import refuse_foreign_formats
from linker_core.weights.generation import GENERATION_FILE
from linker_core.weights.lora import ADAPTER_FILE
from linker_core.weights.lora_config import ADAPTER_CONFIG
from linker_core.weights.shards import INDEX_FILE


class SourceKind(StrEnum):
    """What a directory is taken for, by the names in it."""

    CHECKPOINT = "checkpoint"
    DELTA = "delta"
    ADAPTER = "adapter"


# Read before anything larger is asked for.
FIRST_FILES = (CONFIG_FILE, ADAPTER_CONFIG, INDEX_FILE)
_SMALL_FILES = frozenset(
    {
        *FIRST_FILES,
        GENERATION_FILE,
        TOKENIZER_FILE,
        "tokenizer_config.json",
        "special_tokens_map.json",
        TEMPLATE_FILE,
    }
)
_MAX_SMALL_BYTES = 64 << 20
_MAX_FILES = 1024
_MAX_NAME_CHARS = 128
_WEIGHTS = re.compile(r"model[A-Za-z0-9._-]{0,96}\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SHA1 = re.compile(r"[0-9a-f]{40}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file to download. Exactly one of the digests is known."""

    name: str
    nbytes: int
    sha256: str | None  # of large files
    git_id: str | None  # SHA-1 of "blob SIZE\\0" and the content

    @property
    def is_weights(self) -> bool:
        """Whether it holds tensors."""
        return self.name not in _SMALL_FILES


def kind_of(names: Iterable[str]) -> SourceKind:
    """Returns what a directory of these names is taken for."""
    present = set(names)
    if ADAPTER_CONFIG in present:
        return SourceKind.ADAPTER
    return SourceKind.DELTA if DELTA_FILE in present else SourceKind.CHECKPOINT


def wanted_files(siblings: Iterable[RepoSibling]) -> list[HubFile]:
    """Returns the files that make a model, small ones first; others are never downloaded.

    Only names that this server reads are taken, from the top of the repository.

    Raises:
        UnsupportedFormatError: There are no weights as safetensors.
        BadCheckpointError: The hub says too little of a file, or there are too many.
    """
    top = {s.rfilename: s for s in siblings if "/" not in s.rfilename}
    kind = kind_of(top)
    weights = {SourceKind.ADAPTER: {ADAPTER_FILE}, SourceKind.DELTA: {DELTA_FILE}}.get(kind)
    if weights is None:
        weights = {name for name in top if _WEIGHTS.fullmatch(name)}
    if not weights & top.keys():
        refuse_foreign_formats(list(top))
        raise UnsupportedFormatError(
            "The repository holds no weights as safetensors at its top. Choose one that does, or "
            "convert it and give the directory."
        )
    chosen = [top[name] for name in sorted(top.keys() & (_SMALL_FILES | weights))]
    if len(chosen) > _MAX_FILES:
        raise BadCheckpointError(f"The repository lists {len(chosen)} weight files, too many.")
    return sorted((_checked(sibling) for sibling in chosen), key=_turn)


def _turn(file: HubFile) -> tuple[bool, bool, str]:
    return file.is_weights, file.name not in FIRST_FILES, file.name


def _checked(sibling: RepoSibling) -> HubFile:
    name = sibling.rfilename
    lfs, nbytes = sibling.lfs, sibling.size
    file = HubFile(
        name=name,
        nbytes=nbytes if isinstance(nbytes, int) else -1,
        sha256=None if lfs is None else lfs.sha256,
        git_id=sibling.blob_id if lfs is None else None,
    )
    known = (file.sha256, _SHA256) if lfs is not None else (file.git_id, _SHA1)
    digest, form = known
    if not isinstance(digest, str) or not form.fullmatch(digest) or file.nbytes < 0:
        raise BadCheckpointError(
            f"{name[:_MAX_NAME_CHARS]}: the hub states no size or no digest of it, so it cannot "
            "be checked."
        )
    if not file.is_weights and file.nbytes > _MAX_SMALL_BYTES:
        raise BadCheckpointError(
            f"{name}: has {file.nbytes} bytes, more than the {_MAX_SMALL_BYTES >> 20} MiB that "
            "are read."
        )
    return file
