"""Everything about a checkpoint that can be checked at once, before a job is accepted.

Blocking: callers run these in a thread.
"""

from __future__ import annotations

import os
from pathlib import Path

from linker_core.errors import BadCheckpointError
from linker_core.sharing.delta import DeltaFile, open_weights
from linker_core.text.files import read_tokenizer_files
from linker_core.text.template_source import TemplateSource
from linker_core.text.tokenizer import Tokenizer
from linker_core.text.trial import pass_trial
from linker_core.weights.architecture import CONFIG_FILE, ModelConfig, parse_config
from linker_core.weights.checkpoint import Checkpoint, Identity
from linker_core.weights.files import open_directory, read_json, refuse_foreign_formats
from linker_core.weights.keys import parse_key
from linker_core.weights.lora import is_adapter
from server.onboarding.adapters import Source, read_adapter
from server.residency.catalog import TextSide

_MAX_CONFIG_BYTES = 1 << 20


def read_text_side(path: Path) -> TextSide:
    """Validates headers, config, tokenizer and template of a checkpoint or a delta folder.

    What a stranger's tokenizer or template does is first seen in a process of its own.

    Raises:
        BadCheckpointError: Damaged or dishonest files.
        UnsupportedFormatError: Not safetensors, or an architecture outside the allow-list.
    """
    with open_weights(path) as weights:
        delta = weights.plan if isinstance(weights, DeltaFile) else None
        files, template = read_tokenizer_files(path), TemplateSource.load(path)
        pass_trial(files, template)
        tokenizer = Tokenizer.of(files)
        return TextSide(
            path=path,
            identity=weights.identity,
            config=weights.config,
            tokenizer=tokenizer,
            template=template,
            eos_token_ids=weights.eos_token_ids,
            generation=dict(weights.generation),
            checkpoint_bytes=weights.nbytes if delta is None else delta.checkpoint_bytes,
            outside_blocks_bytes=(
                0 if isinstance(weights, DeltaFile) else _outside_blocks_bytes(weights)
            ),
            delta=delta,
        )


def read_source(path: Path) -> Source:
    """Validates a directory as what it is: an adapter, a delta folder or a checkpoint.

    Raises:
        BadCheckpointError: See `read_text_side` and `read_adapter`.
        UnsupportedFormatError: See `read_text_side`.
    """
    return read_adapter(path) if is_adapter(path) else read_text_side(path)


def read_again(path: Path, *, source: str, identity: Identity | None = None) -> Source:
    """Validates a source that was accepted earlier, and that it is still in its place.

    Args:
        path: Where it is looked for.
        source: Where it was, every link followed then. A link that has come into the path since
            could lead out of the roots.
        identity: Of the files that were accepted; None if only their digest is known.

    Raises:
        BadCheckpointError: The directory or its files were replaced, or see `read_text_side`.
        UnsupportedFormatError: See `read_text_side`.
    """
    again = read_source(path)
    moved = str(path.resolve()) != source  # asked after the files were opened
    if moved or identity not in (None, again.identity):
        raise BadCheckpointError(
            "The model's files were replaced after they had been checked. Onboard it again when "
            "they are complete."
        )
    return again


def read_shape(path: Path) -> ModelConfig | None:
    """Returns the shape of a directory that holds a config.json and no weights; None for others.

    Raises:
        BadCheckpointError: No such directory, or a config that lies.
        UnsupportedFormatError: Weights of another format, or an architecture that is not served.
    """
    directory = open_directory(path)
    try:
        names = os.listdir(directory)  # noqa: PTH208 - of a descriptor, not a path
        refuse_foreign_formats(names)
        if CONFIG_FILE not in names or any(name.endswith(".safetensors") for name in names):
            return None
        return parse_config(read_json(directory, CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES))
    finally:
        os.close(directory)


def _outside_blocks_bytes(checkpoint: Checkpoint) -> int:
    """Returns the bytes of embedding, final norm and head."""
    outside = 0
    for name, tensor in checkpoint.tensors.items():
        key = parse_key(name)
        assert key is not None
        outside += tensor.nbytes if key.layer is None else 0
    return outside
