"""What the small files beside a model's weights say: its config and its generation defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from linker_core.weights.architecture import CONFIG_FILE, ModelConfig, parse_config
from linker_core.weights.fields import Fields
from linker_core.weights.files import read_json, refuse_foreign_formats
from linker_core.weights.generation import GENERATION_FILE, sampling_defaults

_MAX_CONFIG_BYTES = 1 << 20


class Settings(NamedTuple):
    """A model without its weights."""

    config: ModelConfig
    eos_token_ids: frozenset[int]  # that end an answer, from both files
    generation: Mapping[str, float | int]  # sampling defaults, within bounds


def read_settings(directory_fd: int) -> tuple[list[str], Settings]:
    """Returns the names in a directory, none of them of a foreign format, and its settings.

    Raises:
        UnsupportedFormatError: Pickles, code, another architecture.
        BadCheckpointError: A file that is missing, irregular or damaged.
    """
    with os.scandir(directory_fd) as entries:
        names = [entry.name for entry in entries]
    refuse_foreign_formats(names)
    config = parse_config(read_json(directory_fd, CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES))
    record: dict[str, object] = {}
    if GENERATION_FILE in names:
        record = read_json(directory_fd, GENERATION_FILE, max_bytes=_MAX_CONFIG_BYTES)
    fields = Fields(record, GENERATION_FILE)
    eos = frozenset((*config.eos_token_ids, *fields.token_ids("eos_token_id")))
    return names, Settings(config, eos, MappingProxyType(sampling_defaults(fields)))
