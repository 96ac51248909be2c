"""A user's texts, read within bounds and made into tokens. Knows no model."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.json_lines import read_bytes

MAX_TOKENS: Final = 1 << 22
_CHARS_PER_TOKEN: Final = 8  # English takes three to five: what lies beyond is seldom needed


def read_text(path: Path, *, param: str) -> str:
    """Returns the text of a UTF-8 file of at most 64 MiB.

    Args:
        path: Of the file.
        param: The option that names it, for the error.

    Raises:
        InvalidRequestError: It cannot be read, is too large, empty, or no UTF-8.
    """
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}; save it as UTF-8"
        raise refusal(path, reason, param=param) from error
    except ValueError as error:
        raise refusal(path, str(error), param=param) from error
    if not text.strip():
        raise refusal(path, "there is no text in it", param=param)
    return text


def first_tokens(tokenizer: Tokenizer, text: str, *, limit: int, vocab_size: int) -> list[int]:
    """Returns at most the first `limit` tokens of a text, with what the tokenizer puts before it.

    Raises:
        InvalidRequestError: The tokenizer fails on the text, or makes ids beyond the model's.
    """
    beginning = text[: _CHARS_PER_TOKEN * limit]
    ids = tokenizer.encode(beginning, add_special_tokens=True)
    if len(ids) <= limit and len(beginning) < len(text):
        ids = tokenizer.encode(text, add_special_tokens=True)
    ids = ids[:limit]
    check_ids(ids, vocab_size=vocab_size)
    return ids


def check_ids(ids: list[int], *, vocab_size: int) -> None:
    """Refuses tokens that a model has no row for.

    Raises:
        InvalidRequestError: See above.
    """
    if max(ids, default=0) >= vocab_size:
        raise InvalidRequestError(
            f"The tokenizer makes ids beyond the model's last, {vocab_size - 1}. Its files are of "
            "another model: copy tokenizer.json from the model's own folder."
        )


def refusal(path: Path, reason: str, *, param: str) -> InvalidRequestError:
    """Returns the error about a file that an option names."""
    return InvalidRequestError(f"--{param} {path.name}: {reason}.", param=param)
