"""What `linker plan --memory-budget` holds: a donor, its KV cache and one variant."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from server.cli.sizes import mib
from server.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """A server's memory for weights and pages, and what is taken before a variant comes."""

    memory_bytes: int
    donor_bytes: int
    kv_bytes: int

    def taken(self, unique_bytes: int) -> int:
        """Returns the bytes of everything with a variant that holds so much to itself."""
        return self.donor_bytes + self.kv_bytes + unique_bytes

    def to_json(self, unique_bytes: int) -> dict[str, Any]:
        """Returns whether a variant fits, and why, as plain JSON values."""
        return {
            "fits": self.taken(unique_bytes) <= self.memory_bytes,
            "memory_bytes": self.memory_bytes,
            "donor_bytes": self.donor_bytes,
            "kv_bytes": self.kv_bytes,
        }

    def verdict(self, unique_bytes: int) -> str:
        """Returns the same as a line to read."""
        taken = self.taken(unique_bytes)
        fits = "fits" if taken <= self.memory_bytes else "does not fit"
        return (
            f"{fits}: donor {mib(self.donor_bytes)} + pages {mib(self.kv_bytes)} + variant "
            f"{mib(unique_bytes)} = {mib(taken)} of {mib(self.memory_bytes)}"
        )


def memory_budget(args: argparse.Namespace) -> MemoryBudget | None:
    """Returns what `--memory-budget` has to hold beside a variant, None where it is not given.

    Raises:
        InvalidRequestError: `--kv` without it.
        LinkerError: No donor that can be read.
    """
    if args.memory_budget is None:
        if args.kv is not None:
            raise InvalidRequestError(
                "kv has no meaning without --fit or --memory-budget.", param="kv"
            )
        return None
    with Checkpoint.open(args.donor) as donor:
        engine = EngineSettings(device=args.device or "cpu").to_engine_config()
        pages = kv_cache_bytes(donor.config, engine)
        return MemoryBudget(
            memory_bytes=args.memory_budget,
            donor_bytes=donor.nbytes,
            kv_bytes=pages if args.kv is None else args.kv,
        )
