"""What `tokenizer.json` says of how texts grow and shrink on their way to tokens, and back.

A tokenizer is a chain of steps that a stranger wrote. Those that put much in the place of little
are refused; of the others it follows how many characters one token can stand for.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Final

from linker_core.errors import BadCheckpointError
from linker_core.text.files import TOKENIZER_FILE

MAX_GROWTH: Final = 64
_MAX_FIXED_CHARS: Final = 64  # that a step adds to every text
_MAX_FIXED_TOKENS: Final = 64  # that are added to every text
_NFC_SHRINKS: Final = 4  # characters at most that composition makes one of
_CHILDREN: Final = ("normalizers", "pretokenizers", "decoders", "processors")
# Those that keep every character in some piece. A Split is one where it removes nothing.
_LOSSLESS_SPLITS: Final = frozenset({"ByteLevel", "Digits", "Metaspace", "Split"})
_BYTE_LEVEL: Final = frozenset(
    [*map(chr, (*range(33, 127), *range(161, 173), *range(174, 256))), *map(chr, range(256, 324))]
)
_BYTE_FALLBACK: Final = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# Steps whose time grows with the text alone; a Split or a Replace is one if its pattern is.
_LINEAR_STEPS: Final = frozenset(
    {"ByteLevel", "Digits", "Lowercase", "Metaspace", "NFC", "NFD", "Prepend", "Replace", "Split",
     "TemplateProcessing"}
)  # fmt: skip
# Of Llama 3 and of Qwen 2: no repetition within a repetition, and no two that take the same.
_LINEAR_PATTERNS: Final = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits +
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)  # fmt: skip
_LINEAR_GROWTH: Final = 4  # what normalisers may make of a character

Record = Mapping[str, object]


def check_bounded(record: Record) -> None:
    """Refuses a tokenizer that makes very much of little.

    Args:
        record: The content of `tokenizer.json`.

    Raises:
        BadCheckpointError: Names the part.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = math.prod((_growth(step) for step in _steps(record.get(part))), start=Fraction(1))
        if growth > MAX_GROWTH:
            raise BadCheckpointError(
                f"{TOKENIZER_FILE}: its {part} can make {float(growth):.3g} characters of one; "
                f"at most {MAX_GROWTH} are taken. Leave out what it puts into texts."
            )
    for step in _steps(record.get("post_processor")):
        for name in ("single", "pair"):
            pieces = step.get(name)
            if isinstance(pieces, Sequence) and len(pieces) > _MAX_FIXED_TOKENS:
                raise BadCheckpointError(
                    f"{TOKENIZER_FILE}: its post_processor adds {len(pieces)} tokens to every "
                    f"text; at most {_MAX_FIXED_TOKENS} are taken."
                )


def max_token_chars(record: Record) -> int | None:
    """Returns how many characters of a text one token can stand for; None where nothing says.

    Args:
        record: The content of `tokenizer.json`.
    """
    model = record.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        return None
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, Mapping):
        return None
    splits = list(_steps(record.get("pre_tokenizer")))
    kinds = {step.get("type") for step in splits}
    removes = any(step.get("behavior") == "Removed" for step in splits)
    if removes or not kinds <= _LOSSLESS_SPLITS:
        return None
    alphabet = _BYTE_LEVEL if "ByteLevel" in kinds else _BYTE_FALLBACK
    if not alphabet <= vocabulary.keys():
        return None  # characters without a token are left out, or all of them together are one
    if alphabet is _BYTE_FALLBACK and not model.get("byte_fallback"):
        return None
    added = list(_records(record.get("added_tokens")))
    if any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None  # they take the spaces beside them, however many
    shrinks = [_shrinks(step) for step in _steps(record.get("normalizer"))]
    if None in shrinks:
        return None
    texts = [*vocabulary, *(str(token.get("content", "")) for token in added)]
    return math.prod(times for times in shrinks if times) * max(map(len, texts), default=1)


def is_linear(record: Record) -> bool:
    """Whether encoding takes time in proportion to the text, whatever that says.

    Patterns of strangers can take for ever over a line, and a WordPiece's time grows with the cube
    of a word; such tokenizers need not be bad ones, but nobody should have to wait beside them.

    Args:
        record: The content of `tokenizer.json`.
    """
    model = record.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        return False
    parts = ("normalizer", "pre_tokenizer", "post_processor")
    steps = [step for part in parts for step in _steps(record.get(part))]
    normalizers = _steps(record.get("normalizer"))
    growth = math.prod((_growth(step) for step in normalizers), start=Fraction(1))
    return growth <= _LINEAR_GROWTH and all(
        step.get("type") in _LINEAR_STEPS and _has_linear_pattern(step) for step in steps
    )


def _has_linear_pattern(step: Record) -> bool:
    pattern = step.get("pattern")
    if not isinstance(pattern, Mapping):
        return True
    return pattern.keys() == {"String"} or pattern.get("Regex") in _LINEAR_PATTERNS


def _steps(node: object) -> Iterator[Record]:
    """Yields the steps of a part, those of sequences one by one."""
    if not isinstance(node, Mapping):
        return
    children = [child for name in _CHILDREN for child in _records(node.get(name))]
    if node.get("type") != "Sequence":
        yield node
    for child in children:
        yield from _steps(child)


def _records(value: object) -> Iterator[Record]:
    if isinstance(value, Sequence):
        yield from (one for one in value if isinstance(one, Mapping))


def _growth(step: Record) -> Fraction:
    """Returns how many characters a step makes of one, at most; a fraction of 1 counts as 1."""
    kind = step.get("type")
    if kind == "Replace":
        old, new = _pattern(step), _length(step.get("content"))
        # A pattern may match between characters, too.
        return Fraction(1 + new) if old is None else max(Fraction(1), Fraction(new, max(1, old)))
    if kind == "Precompiled":
        return Fraction(_longest_replacement(step.get("precompiled_charsmap")))
    if kind == "Prepend" and _length(step.get("prepend")) > _MAX_FIXED_CHARS:
        return Fraction(_length(step.get("prepend")))
    return Fraction(1)


def _shrinks(step: Record) -> int | None:
    """Returns how many characters a normaliser makes one of, at most; None where nothing says."""
    kind = step.get("type")
    if kind == "NFC":
        return _NFC_SHRINKS
    if kind in ("NFD", "NFKD", "Prepend", "ByteLevel"):
        return 1
    if kind == "Replace":
        old, new = _pattern(step), _length(step.get("content"))
        return None if old is None or not new else max(1, math.ceil(old / new))
    return None


def _pattern(step: Record) -> int | None:
    """Returns the length of what a step replaces; None for a regular expression."""
    pattern = step.get("pattern")
    text = pattern.get("String") if isinstance(pattern, Mapping) else None
    return len(text) if isinstance(text, str) else None


def _length(text: object) -> int:
    return len(text) if isinstance(text, str) else 0


def _longest_replacement(charsmap: object) -> int:
    """Returns the length of the longest text in SentencePiece's map: a trie, then texts and NULs.

    Raises:
        BadCheckpointError: It is none.
    """
    try:
        data = base64.b64decode(charsmap if isinstance(charsmap, str) else "", validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadCheckpointError(f"{TOKENIZER_FILE}: its precompiled_charsmap is none.") from error
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(1, *(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0")))
