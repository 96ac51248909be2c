"""The seed of a study's random draws."""

from __future__ import annotations

from linker_core.errors import InvalidRequestError


def check_seed(seed: int) -> None:
    """Refuses what no generator can be seeded with.

    Raises:
        InvalidRequestError: It is negative.
    """
    if seed < 0:
        raise InvalidRequestError(f"--seed is {seed}, expected 0 or more.", param="seed")
