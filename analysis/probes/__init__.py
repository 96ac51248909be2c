"""The probes: one experiment a file, each with one question and one table for an answer.

A probe is a module with `add_arguments(parser)` for what it takes beside the models, and
`run(family, args)`. Nothing is imported before it is asked for: some probes need torch, most not.
"""

from __future__ import annotations

import difflib
import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol, cast

from analysis.family import StudiedFamily
from analysis.probes.result import ProbeResult
from linker_core.errors import InvalidRequestError

# Name -> what it answers. Its module has the name with underscores.
PROBES: Mapping[str, str] = MappingProxyType({
    "byte-identical": "how many tensors did fine-tuning leave untouched? (BS 3.1)",
    "aggregation": "does the mean over a block's tensors hide an outlier? (BS tables 6, 9, 16)",
    "regions": "which pairs are aligned, boundary or outside, variants among them? (BS table 2)",
    "version-over-version": "did later releases move less than earlier ones? (BS table 10)",
    "gain": "does a farther fine-tune gain more? (BS figure 2)",
    "low-rank": "do low-rank factors of a delta take less than the block? (BS table 11)",
    "mlp-permutation": "does the cosine see a permutation of MLP neurons? (BS 3.3)",
    "head-permutation": "does the cosine see a permutation of attention heads? (BS table 3)",
    "rmsnorm-rescaling": "what do cos and ε make of rescaled channels? (BS table 3)",
    "interpolation": "is there a barrier in the loss between variant and base? (BS 3.4, L)",
    "amplification": "does an aliased block's error grow from layer to layer? (BS H)",
    "gradient-locality": "do blocks of small gradients move less? (BS Q)",
    "generation-overlap": "do answers survive on the base's blocks? (BS O)",
    "refusal-direction": "do deltas lie along the refusal direction? (FM D)",
})  # fmt: skip


class Probe(Protocol):
    """What a probe's module has."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Declares what the probe takes beside the models."""

    @staticmethod
    def run(family: StudiedFamily, args: Namespace) -> ProbeResult:
        """Answers the probe's question for an open family.

        Raises:
            LinkerError: Arguments that cannot be honoured, or a checkpoint that cannot be read.
        """


def load(name: str) -> Probe:
    """Imports a probe.

    Raises:
        InvalidRequestError: No such probe; names the nearest.
    """
    if name not in PROBES:
        near = difflib.get_close_matches(name, PROBES, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(PROBES)}."
        raise InvalidRequestError(f"{name!r:.60} is no probe. {hint}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return cast(Probe, module)
