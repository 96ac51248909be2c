"""The files of a model's text side: their names and bounds, and the settings beside a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from linker_core.errors import BadCheckpointError
from linker_core.weights.files import parse_object, read_optional

TOKENIZER_FILE: Final = "tokenizer.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
MAX_FILE_BYTES: Final = 64 << 20  # the largest known tokenizer.json has 34 MB


class TokenizerFiles(NamedTuple):
    """What a tokenizer is made of, read once: whoever tries it tries what is used."""

    data: bytes  # of tokenizer.json
    settings: Mapping[str, object]  # beside it

    @property
    def digest(self) -> str:
        """Of all of it."""
        settings = json.dumps(self.settings, sort_keys=True).encode()
        return hashlib.sha256(hashlib.sha256(self.data).digest() + settings).hexdigest()


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Reads `tokenizer.json` and the settings beside it, without building anything of them.

    Raises:
        BadCheckpointError: A file is missing, irregular, too large, or its settings are damaged.
    """
    data = read_optional(directory, TOKENIZER_FILE, max_bytes=MAX_FILE_BYTES)
    if data is None:
        raise BadCheckpointError(
            f"{TOKENIZER_FILE}: no such file beside the weights, so the model cannot read "
            "text; save the tokenizer with the model (save_pretrained writes it)"
        )
    return TokenizerFiles(data, read_tokenizer_config(directory))


def read_tokenizer_config(directory: Path) -> Mapping[str, object]:
    """Returns `tokenizer_config.json` over `special_tokens_map.json`, empty where neither is.

    Raises:
        BadCheckpointError: A file is damaged.
    """
    merged: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        data = read_optional(directory, name, max_bytes=MAX_FILE_BYTES)
        if data is not None:
            merged |= parse_object(data, name)
    return merged


def token_name(config: Mapping[str, object], key: str) -> str | None:
    """Returns the text of a special token that the settings name, such as `bos_token`.

    Raises:
        BadCheckpointError: It is neither a text nor a token.
    """
    value = config.get(key)
    if isinstance(value, Mapping):  # the form that keeps the added token's flags
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise BadCheckpointError(f"tokenizer_config.json: {key} is neither a text nor a token")
    return value
