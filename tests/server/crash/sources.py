"""What is onboarded while faults happen: something new every time, of which nothing is known."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lora import make_adapter
from tests.server.onboarding.fake_hub import FakeHub
from tests.server.onboarding.family import residual
from tests.tiny import make_checkpoint, make_variant

WAYS = ("budget", "thresholds", "exact", "import", "adapter", "hub")
_RUNGS = {"0.001": "int4:64", "0.02": "rank2:8+signs:64"}
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "budget": {"policy": "budget"},
    "thresholds": {"policy": "thresholds", "tau_cos": 0.0, "tau_frob": 1e6},
    "exact": {"policy": "exact"},
    "import": {},
    "adapter": {},
    "hub": {"policy": "exact"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One model to onboard."""

    name: str
    source: Path | str
    options: Mapping[str, Any] = field(default_factory=dict)


class Sources:
    """Makes checkpoints, adapters and delta folders under a root.

    Args:
        root: Holds the donor `base`.
        shipped: A delta folder of a variant of it.
        hub: Runs.
    """

    def __init__(self, root: Path, shipped: Path, hub: FakeHub) -> None:
        self.root = root
        self.hub = hub
        self._shipped = shipped
        self._number = 0

    def next(self, way: str) -> Request:
        """Returns something new to onboard in one of `WAYS`."""
        self._number += 1
        name = f"{way}-{self._number}"
        path, base = self.root / name, self.root / "base"
        source: Path | str = path
        if way == "adapter":
            make_adapter(path, base, seed=self._number)
        elif way == "import":
            shutil.copytree(self._shipped, path)
        else:
            make_variant(path, base, scale=0.05, seed=self._number)
            if way == "budget":
                residual(path, _RUNGS)
            elif way == "hub":
                self.hub.add(f"acme/{name}", path)
                shutil.rmtree(path)
                source = f"hub:acme/{name}@main"
        return Request(name=name, source=source, options=_OPTIONS[way])


def make_base(root: Path) -> Path:
    """Writes the donor."""
    return make_checkpoint(root / "base", hidden=64, intermediate=64, tie=False)
