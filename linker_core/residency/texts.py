"""The small files of a model that go with its delta: config, tokenizer, template, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from linker_core.text.files import (
    MAX_FILE_BYTES,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    read_tokenizer_config,
)
from linker_core.weights.architecture import CONFIG_FILE
from linker_core.weights.files import read_optional
from linker_core.weights.generation import GENERATION_FILE

_TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json")
_ALLOWED = (CONFIG_FILE, GENERATION_FILE, *_TOKENIZER_FILES, TEMPLATE_FILE)


def checkpoint_texts(path: Path) -> dict[str, Path]:
    """Returns name -> folder of the files that are copied from a checkpoint."""
    return dict.fromkeys(_ALLOWED, path)


def adapter_texts(adapter: Path, base: Path) -> dict[str, Path]:
    """Returns name -> folder of the files of an adapter on its base.

    Tokenizer and template are the adapter's if it has them. A template inside the adapter's
    tokenizer_config.json comes before the base's file, which would otherwise hide it.

    Raises:
        BadCheckpointError: The adapter's tokenizer_config.json is irregular or damaged.
    """
    sources = checkpoint_texts(base)
    if (adapter / TOKENIZER_FILE).exists():
        sources |= dict.fromkeys(_TOKENIZER_FILES, adapter)
        if "chat_template" in read_tokenizer_config(adapter):
            del sources[TEMPLATE_FILE]
    for name in (TEMPLATE_FILE, GENERATION_FILE):
        if (adapter / name).exists():
            sources[name] = adapter
    return sources


def copy_texts(sources: Mapping[str, Path], folder: Path) -> None:
    """Copies the files that are there.

    Raises:
        BadCheckpointError: One of them is irregular or far too large.
    """
    for name, source in sources.items():
        content = read_optional(source, name, max_bytes=MAX_FILE_BYTES)
        if content is not None:
            (folder / name).write_bytes(content)
