"""Ways to spoil a folder of weights that know how it is built.

Each takes the folder and a generator, changes one thing, and returns whether what can still be read
may differ from the original: a flipped bit of the data does, a longer header must not.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

from tests.linker_core.weights.corruption.data_mutations import DATA
from tests.linker_core.weights.corruption.files import Mutation
from tests.linker_core.weights.corruption.folder_mutations import FOLDER
from tests.linker_core.weights.corruption.header_mutations import HEADER
from tests.linker_core.weights.corruption.json_mutations import CONFIG, VALUES, index_entry

# What a mutation meets where another one was before it.
_IN_RUINS = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, struct.error,
    RecursionError,
)  # fmt: skip
ADAPTER: tuple[Mutation, ...] = (*HEADER, *DATA, *VALUES, *VALUES, *FOLDER)
DELTA: tuple[Mutation, ...] = (*HEADER, *DATA, *VALUES, *CONFIG, *FOLDER)
CHECKPOINT: tuple[Mutation, ...] = (*DELTA, index_entry, index_entry)


def mutate(folder: Path, rng: random.Random, kinds: tuple[Mutation, ...]) -> tuple[str, bool]:
    """Spoils a folder once, sometimes twice or thrice; says how, and whether content may differ.

    What is spoilt already may not be there for the next: that one is left out.
    """
    done: list[str] = []
    differs = False
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        kind = rng.choice(kinds)
        try:
            differs |= kind(folder, rng)
        except _IN_RUINS:
            if not done:
                raise
        else:
            done.append(kind.__name__)
    return " + ".join(done), differs
