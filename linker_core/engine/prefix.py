"""The names of cached pages: a chain of digests over all that their keys and values depend on.

A page's key is SHA-256 over the key of the page before it and the page's token ids, each as four
little-endian bytes. The chain begins with a root that no two variants, plans or salts share, so a
page is found by those alone who would compute the same.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence


def key_root(*, plan_fingerprint: str, slot: int, salt: str) -> bytes:
    """Returns where the key chain of a sequence begins.

    Args:
        plan_fingerprint: Of the plan that the variant is served with.
        slot: The variant's slot, which no later variant gets again. Pages of one that is gone are
            therefore found by nobody, and reclaimed like any that are long unused.
        salt: The tenant's; sequences of another salt find nothing of this one.
    """
    digest = hashlib.sha256(struct.pack("<Q", slot))
    for text in (plan_fingerprint, salt):
        encoded = text.encode(errors="surrogatepass")
        # With its length before it, no text can run into the next.
        digest.update(struct.pack("<Q", len(encoded)) + encoded)
    return digest.digest()


class PageKeys:
    """The keys of one sequence's pages, worked out once and only as far as they are asked for.

    Args:
        root: Where the chain begins; None for a sequence that shares nothing.
    """

    __slots__ = ("_keys", "_root")

    def __init__(self, root: bytes | None) -> None:
        self._root = root
        self._keys: list[bytes] = []

    def first(self, num_pages: int, tokens: Sequence[int], page_tokens: int) -> list[bytes]:
        """Returns the keys of the first `num_pages` pages, all of them full; [] without a root."""
        if self._root is None:
            return []
        assert num_pages * page_tokens <= len(tokens)
        keys = self._keys
        if len(keys) < num_pages:
            pack = struct.Struct(f"<{page_tokens}I").pack
            key = keys[-1] if keys else self._root
            for start in range(len(keys) * page_tokens, num_pages * page_tokens, page_tokens):
                ids = pack(*tokens[start : start + page_tokens])
                key = hashlib.sha256(key + ids).digest()
                keys.append(key)
        return keys[:num_pages]
