"""A checkpoint's tokenizer: text to token ids and back. Knows no template and no model.

Needs only `tokenizers`: transformers would bring torch into every process that speaks text.
One that several models have is read once and held once, for as long as one of them is known.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

import tokenizers

from linker_core.errors import BadCheckpointError, InvalidRequestError, LinkerError
from linker_core.text.byte_tokens import ByteTokens
from linker_core.text.files import (
    TOKENIZER_FILE,
    TokenizerFiles,
    read_tokenizer_files,
    token_name,
)
from linker_core.text.tokenizer_bounds import check_bounded, is_linear, max_token_chars
from linker_core.weights.files import parse_object

MAX_ADDED_TOKENS: Final = 65_536  # each costs a pattern of the splitter; a million take minutes


class Tokenizer:
    """Encodes and decodes as `tokenizer.json` says.

    Calls from several threads at once are safe. Unlike transformers, `decode` never "cleans up"
    spaces before punctuation: text that is streamed cannot be taken back.

    Attributes:
        num_tokens: One past the largest token id.
        special_ids: Ids that `decode` leaves out unless asked otherwise.
        bos_token: Text of the beginning-of-sequence token, if the configuration names one.
        eos_token: Text of the end-of-sequence token, if the configuration names one.
        pad_token: Text of the token that fills batches up, if the configuration names one.
        unk_token: Text of the token for what has none, if the configuration names one.
        max_token_chars: How many characters of a text one token can stand for; None where that
            is not known.
        is_linear: Whether encoding is known to take time in proportion to the text.
        byte_tokens: What each token stands for, where decoding only joins that.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos_token: str | None,
        eos_token: str | None,
        pad_token: str | None = None,
        unk_token: str | None = None,
        max_token_chars: int | None = None,
        is_linear: bool = False,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.byte_tokens = ByteTokens.of(inner)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.pad_token = pad_token
        self.unk_token = unk_token
        self.max_token_chars = max_token_chars
        self.is_linear = is_linear
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.num_tokens = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """Reads `tokenizer.json`, and the names of bos and eos from the configuration beside it.

        Returns:
            The same tokenizer for every directory that says the same, while anybody holds it.

        Raises:
            BadCheckpointError: A file is missing, too large, malformed, or crashes the tokenizer.
        """
        return Tokenizer.of(read_tokenizer_files(directory))

    @staticmethod
    def of(files: TokenizerFiles) -> Tokenizer:
        """Builds the tokenizer of files that were read; see `load`.

        Raises:
            BadCheckpointError: A file is malformed, makes very much of little, or crashes the
                tokenizer.
        """
        settings = files.settings
        contents = _Contents(
            hashlib.sha256(files.data).digest(),
            *(token_name(settings, f"{name}_token") for name in ("bos", "eos", "pad", "unk")),
        )
        tokenizer = _held(contents) or _parse(files.data, contents)
        with _failures_as(BadCheckpointError(f"{TOKENIZER_FILE}: cannot be used")):
            _check_declared_tokens(tokenizer._inner, settings)
        return _hold(contents, tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the ids of `text`; special tokens written out in the text become their ids.

        Args:
            text: Any text, rendered templates included.
            add_special_tokens: Whether bos and the like are added as the tokenizer prescribes.

        Raises:
            InvalidRequestError: The text is not Unicode, or this tokenizer fails on it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text holds half of a surrogate pair at character {error.start}; "
                "send whole characters"
            ) from error
        with _failures_as(InvalidRequestError("the model's tokenizer failed on this text")):
            return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`; ids without a token give nothing, broken UTF-8 gives U+FFFD.

        Raises:
            InvalidRequestError: This tokenizer fails on these ids.
        """
        with _failures_as(InvalidRequestError("the model's tokenizer failed on these token ids")):
            return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Returns the text of one token as it reads inside a text, so with its leading space."""
        once = self.decode((token_id,), skip_special_tokens=False)
        twice = self.decode((token_id, token_id), skip_special_tokens=False)
        # Metaspace decoders drop the first space of a text: the second copy still has it.
        return twice[len(once) :] if twice.startswith(once) else once

    def token_name(self, token_id: int) -> str:
        """Returns a token as the vocabulary spells it, which is not how it reads; "" for none."""
        return self._inner.id_to_token(token_id) or ""

    def has_token(self, token_id: int) -> bool:
        """Says whether the id stands for a token; rows that only pad the head do not."""
        return 0 <= token_id < self.num_tokens and self._inner.id_to_token(token_id) is not None


class _Contents(NamedTuple):
    """What a tokenizer is made of."""

    digest: bytes  # of tokenizer.json
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None


_in_use: WeakValueDictionary[_Contents, Tokenizer] = WeakValueDictionary()
_in_use_lock = threading.Lock()  # models are read in threads


def _held(contents: _Contents) -> Tokenizer | None:
    """Returns a tokenizer that was read before and is in use."""
    with _in_use_lock:
        return _in_use.get(contents)


def _hold(contents: _Contents, tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer of these contents: another thread's, where that was faster."""
    with _in_use_lock:
        return _in_use.setdefault(contents, tokenizer)


def _parse(data: bytes, contents: _Contents) -> Tokenizer:
    """Returns a tokenizer that has been tried.

    Raises:
        BadCheckpointError: It is malformed, or crashes.
    """
    record = parse_object(data, TOKENIZER_FILE)
    check_bounded(record)
    added = record.get("added_tokens") or ()
    if not isinstance(added, Sequence) or len(added) > MAX_ADDED_TOKENS:
        raise BadCheckpointError(
            f"{TOKENIZER_FILE}: added_tokens is not a list of at most {MAX_ADDED_TOKENS} entries"
        )
    with _failures_as(BadCheckpointError(f"{TOKENIZER_FILE}: cannot be used")):
        tokenizer = Tokenizer(
            tokenizers.Tokenizer.from_str(data.decode()),
            bos_token=contents.bos_token,
            eos_token=contents.eos_token,
            pad_token=contents.pad_token,
            unk_token=contents.unk_token,
            max_token_chars=max_token_chars(record),
            is_linear=is_linear(record),
        )
        tokenizer.decode(tokenizer.encode("Hello, 世界!", add_special_tokens=True))
    return tokenizer


def _check_declared_tokens(inner: tokenizers.Tokenizer, config: Mapping[str, object]) -> None:
    """Refuses a configuration that declares tokens which `tokenizer.json` does not know.

    transformers would add them on loading; here the file that encodes must hold them.
    """
    declared = config.get("added_tokens_decoder")
    for key, entry in declared.items() if isinstance(declared, Mapping) else ():
        text = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(text, str) or inner.token_to_id(text) != int(key):
            raise BadCheckpointError(
                f"tokenizer_config.json: declares token {key!r:.20} as {text!r:.60}, which "
                "tokenizer.json does not hold. Load and save the tokenizer once more."
            )


@contextmanager
def _failures_as(stand_in: LinkerError) -> Iterator[None]:
    """Turns whatever `tokenizers` raises, a panic of its Rust code included, into `stand_in`."""
    try:
        yield
    except LinkerError:
        raise
    except BaseException as error:
        # `tokenizers` raises bare Exception; pyo3's PanicException is a BaseException and has no
        # importable name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        stand_in.message = f"{stand_in.message}: {str(error)[:200]}"
        stand_in.args = (stand_in.message,)
        raise stand_in from error
