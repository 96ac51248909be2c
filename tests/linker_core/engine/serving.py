"""An engine with a donor and two variants, and transformers' model of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from linker_core.config import EngineConfig
from linker_core.engine.messages import ModelLoaded
from tests.linker_core.engine.driving import SMALL, Driver, load_message
from tests.linker_core.engine.families import reference_model, stored_tensors
from tests.tiny import make_checkpoint, make_variant

PROMPT = [300, 17, 254, 8, 91, 411, 5]


def first_block(name: str) -> bool:
    return "layers.0" in name


@dataclass
class Served:
    """An engine with a donor and two variants, and transformers' model of each."""

    driver: Driver
    paths: dict[str, Path]
    references: dict[str, PreTrainedModel]


def serve_three(tmp_path: Path, architecture: str, config: EngineConfig = SMALL) -> Served:
    # A tied random model repeats its last token for ever.
    base = make_checkpoint(tmp_path / "base", architecture=architecture, tie=False)
    paths = {
        "base": base,
        "own": make_variant(tmp_path / "own", base, scale=0.4, added_tokens=("<a>", "<b>")),
        "half": make_variant(tmp_path / "half", base, scale=0.3, seed=5),
    }
    driver = Driver(config)
    donor = stored_tensors(base)
    half = stored_tensors(paths["half"], donor=donor, aliased=first_block)
    references = {
        "base": reference_model(base),
        "own": reference_model(paths["own"]),
        "half": reference_model(base, stored=half),
    }
    loads = [
        load_message("base", base),
        load_message("own", paths["own"], donor="base"),
        load_message("half", paths["half"], donor="base", aliased=first_block),
    ]
    for load in loads:
        assert isinstance(driver.load(load), ModelLoaded)
    return Served(driver, paths, references)
