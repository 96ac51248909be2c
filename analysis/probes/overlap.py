"""How alike two texts are: ROUGE-L and tokens that are equal. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

_WORDS = re.compile(r"\w+")


def rouge_l(reference: str, candidate: str) -> float:
    """Returns the F1 of the longest common subsequence of words (Lin 2004), case apart.

    Two texts without a word are equal (1); one without is unlike any other (0).
    """
    a, b = (_WORDS.findall(text.casefold()) for text in (reference, candidate))
    if not a or not b:
        return float(a == b)
    common = longest_common(a, b)
    return 2 * common / (len(a) + len(b))


def longest_common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Returns the length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for item in a:
        above = 0  # of the row before, one column to the left
        for column, other in enumerate(b, start=1):
            above, lengths[column] = (
                lengths[column],
                above + 1 if item == other else max(lengths[column], lengths[column - 1]),
            )
    return lengths[-1]


def common_prefix(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Returns how many items are equal before the first that differs."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
