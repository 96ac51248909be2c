"""What each token of a byte-level tokenizer stands for. Knows no sequence."""

from __future__ import annotations

from typing import Final

import tokenizers

# The printable bytes stand for themselves, in Latin-1; the others for characters from 256 on.
_PRINTABLE: Final = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS: Final = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
_BYTES: Final = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(_OTHERS)
}


class ByteTokens(dict[int, str | bytes]):
    """By token id: its text, or its bytes where they are no whole characters.

    Decoding joins the bytes of all tokens and does nothing else, so a token reads the same wherever
    it stands. An id that no token has is an empty text. Entries are made when they are first read.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._inner = inner

    @classmethod
    def of(cls, inner: tokenizers.Tokenizer) -> ByteTokens | None:
        """Returns the tokens of a tokenizer, or None where decoding does more than join bytes."""
        if type(inner.decoder) is not tokenizers.decoders.ByteLevel:
            return None
        return cls(inner)

    def __missing__(self, token_id: int) -> str | bytes:
        token = self._inner.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return ""
        known = [_BYTES.get(character) for character in token]
        # One character outside of the alphabet makes the decoder take the whole token as it is.
        data = (
            token.encode() if None in known else bytes(byte for byte in known if byte is not None)
        )
        try:
            self[token_id] = data.decode()
        except UnicodeDecodeError:
            self[token_id] = data
        return self[token_id]
