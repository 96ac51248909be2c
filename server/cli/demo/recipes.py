"""How the demo's family is made: shapes, steps and rates. Changing a number makes a new family."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from typing import Final

MODELS: Final = ("base", "instruct", "chat", "code")  # the donor first


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama without biases: few and square enough to train in a minute on two cores."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 2_048
    max_position_embeddings: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One run. Steps are counted, not timed, so that every machine makes the same family."""

    steps: int
    batch: int  # sequences per step
    length: int  # tokens per sequence at most
    block_rate: float  # of the blocks' matrices
    embedding_rate: float  # of the embedding, which is the head too, and of the norms


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The whole family.

    Base and code are trained with Muon at a high rate on running text. Instruct and chat are
    trained lightly: their blocks at a rate that leaves each within the sharing thresholds, their
    norms not at all, and their embedding, which no plan shares, at a rate that lets it learn.
    """

    shape: Shape
    base: Training
    instruct: Training
    chat: Training
    code: Training
    seed: int = 0
    held_out_every: int = 16  # one in so many texts, and things to ask about, is never trained on


FAMILY: Final = Recipe(
    shape=Shape(),
    base=Training(steps=240, batch=8, length=128, block_rate=0.02, embedding_rate=6e-3),
    instruct=Training(steps=60, batch=16, length=96, block_rate=5e-5, embedding_rate=4e-3),
    chat=Training(steps=50, batch=8, length=160, block_rate=5e-5, embedding_rate=4e-3),
    code=Training(steps=80, batch=8, length=128, block_rate=0.02, embedding_rate=6e-3),
)


def tiny(recipe: Recipe, *, steps: int) -> Recipe:
    """Returns the same family at a size that trains in a second, for trying the way it is built."""
    few = {
        name: replace(getattr(recipe, name), steps=steps, batch=2, length=48)
        for name in ("base", "instruct", "chat", "code")
    }
    shape = replace(
        recipe.shape, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=16, vocab_size=384,
    )  # fmt: skip
    return replace(recipe, shape=shape, **few)


def version(recipe: Recipe) -> str:
    """Returns a short name of what a recipe makes with this Python's text."""
    text = f"{recipe!r} {sys.version_info[:3]}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]
