"""One base checkpoint and variants that lean on it in every way, with what each answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from linker_core.config import EngineConfig
from linker_core.engine.messages import LoadModel, ModelLoaded
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_rungs
from linker_core.sharing.rungs import AnyRung, Rung, parse_rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.engine.driving import GREEDY, SMALL, Driver, load_message
from tests.linker_core.residency.deltas import DONOR, donor_plan, matrices, write_planned
from tests.tiny import make_checkpoint, make_variant

PROMPT = [300, 17, 254, 8, 91, 411, 5]
PARAMS = replace(GREEDY, logprobs=0)
VARIANTS = ("first", "second", "rows", "delta", "mirror", "apart")
Answer = list[tuple[int, float | None]]


@dataclass
class Kinfolk:
    """The base and its variants on disk, with their plans."""

    folder: Path
    plans: dict[str, SharePlan]
    known: dict[tuple[str, tuple[int, ...]], Answer] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def path(self, kind: str) -> Path:
        return self.base if kind == "mirror" else self.folder / kind

    def message(
        self, kind: str, *, donor: str | None = None, model: str | None = None
    ) -> LoadModel:
        """Loads a variant over a head, or as the founder of a family; `base` is the plain donor."""
        leans = kind != "base"
        return load_message(
            model or kind,
            self.path(kind),
            donor=donor,
            plan=self.plans[kind],
            base=self.base if leans else None,
        )

    def driver(self, *kinds: str, config: EngineConfig = SMALL) -> Driver:
        """An engine with some of them, the first as the head."""
        driver = Driver(config)
        for kind in kinds:
            donor = None if kind == kinds[0] else kinds[0]
            load(driver, self.message(kind, donor=donor))
        return driver

    def alone(self, kind: str, prompt: list[int]) -> Answer:
        """What a model answers beside its donor and nobody else."""
        key = (kind, tuple(prompt))
        if key not in self.known:
            driver = self.driver(*dict.fromkeys(("base", kind)))
            self.known[key] = answer(driver, kind, prompt)
        return self.known[key]


def load(driver: Driver, message: LoadModel) -> ModelLoaded:
    """Loads what has to be possible to load."""
    loaded = driver.load(message)
    assert isinstance(loaded, ModelLoaded), loaded
    return loaded


def answer(driver: Driver, model: str, prompt: list[int]) -> Answer:
    """Runs one request to its end, and whatever else there is."""
    request_id = driver.submit(model, prompt, PARAMS)
    driver.run()
    assert request_id not in driver.errors, driver.errors
    return said(driver, request_id)


def said(driver: Driver, request_id: str) -> Answer:
    return [(token.token_id, token.logprob) for token in driver.outputs[request_id]]


def make_kinfolk(folder: Path, *, tie: bool = False) -> Kinfolk:
    """A donor of three blocks, and variants of it.

    Of `first` the first block is aliased, of `second` the second. `rows` differs in some rows and a
    matrix; `delta` has residuals everywhere; `mirror` is the donor's checkpoint with every tensor
    aliased, `apart` aliases nothing.
    """
    base = make_checkpoint(folder / "base", tie=tie, layers=3)
    names = matrices(base)
    rows = {EMBED_NAME: (*PROMPT[:2], 9)} | ({} if tie else {LM_HEAD_NAME: range(0, 512, 3)})
    up = "model.layers.1.mlp.up_proj.weight"
    for number, kind in enumerate(("first", "second", "apart")):
        make_variant(folder / kind, base, scale=0.3, seed=number + 1)
    make_variant(folder / "rows", base, scale={up: 0.4}, rows=rows, added_tokens=("<a>",))
    make_variant(folder / "whole", base, scale=0.4, seed=8)
    cycle = (parse_rung("signs:64"), parse_rung("rank3:8"), Rung.ALIAS)
    residuals: dict[str, AnyRung] = {name: cycle[n % 3] for n, name in enumerate(names)}
    plans = {
        "base": donor_plan(base),
        "first": _planned(base, folder / "first", _aliases(base, "model.layers.0.")),
        "second": _planned(base, folder / "second", _aliases(base, "model.layers.1.")),
        "apart": _planned(base, folder / "apart", {}),
        "rows": _planned(
            base,
            folder / "rows",
            _aliases(base, "model.layers.2.") | dict.fromkeys(rows, Rung.ROWS),
        ),
        "mirror": _planned(base, base, _aliases(base, ""), fingerprint=DONOR),
        "delta": write_planned(base, folder / "whole", folder / "delta", residuals),
    }
    return Kinfolk(folder, plans)


def _aliases(base: Path, prefix: str) -> dict[str, Rung]:
    with Checkpoint.open(base) as checkpoint:
        return {name: Rung.ALIAS for name in checkpoint.tensors if name.startswith(prefix)}


def _planned(
    base: Path, path: Path, rungs: Mapping[str, Rung], *, fingerprint: str | None = None
) -> SharePlan:
    """The plan of given rungs; what they leave out is the variant's own."""
    with Checkpoint.open(base) as donor, Checkpoint.open(path) as variant:
        return plan_rungs(
            scan(donor, variant),
            donor,
            variant,
            {name: rungs.get(name, Rung.OWN) for name in variant.tensors},
            policy=Policy.THRESHOLDS,
            fingerprints=Fingerprints(DONOR, fingerprint or path.name),
        )
