"""What plans share and cost, block by block, written once for as long as a plan is the same.

Fifty models are thousands of series that change when a model is onboarded or planned anew, and
never at a scrape.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from linker_core.errors import NotReadyError
from linker_core.sharing.plan import Policy
from linker_core.sharing.plan_blocks import PlanParts, parts_of
from linker_core.sharing.rungs import COARSE, CODE_BITS, GROUPS, Residual, Rung
from linker_core.weights.architecture import ModelConfig
from server.metrics.families import FAMILIES
from server.metrics.text import header, series
from server.metrics.view import View
from server.registry.records import Json
from server.registry.store import Registry

logger = logging.getLogger(__name__)

_DENSE = [Residual(bits=bits, group=GROUPS[0]).kind for bits in CODE_BITS]
_LOW_RANK = Residual(rank=1, factor_bits=8).kind
# What a model's unique bytes are in; an alias has none.
KINDS = (
    *(Rung.ROWS.value, _LOW_RANK, *_DENSE),
    *(f"{_LOW_RANK}+{dense}" for dense in _DENSE),
    Rung.OWN.value,
)
_PRICES = {
    "linker_plan_kl_nats": "kl",
    "linker_plan_kl_upper_nats": "kl_upper",
    "linker_plan_top1_agreement_ratio": "top1",
    "linker_plan_perplexity_ratio": "ppl_ratio",
}
_SCANNED = {"linker_block_cosine": "cos", "linker_block_epsilon": "epsilon"}
_FAMILIES = (
    "linker_model_blocks",
    "linker_model_rung_bytes",
    "linker_model_bits_per_weight",
    *_PRICES,
    "linker_plan_budget_kl_nats",
    *_SCANNED,
    "linker_block_rung",
    "linker_block_unique_bytes",
    "linker_section_unique_bytes",
)


class _Sample(NamedTuple):
    family: str
    labels: dict[str, str]  # without the model
    value: float


class _Written(NamedTuple):
    """The lines of one model, by family, and what they were made of."""

    plan: Json
    config: ModelConfig | None
    lines: dict[str, str]


class SharingSeries:
    """The series of every model that has a plan. One thread at a time may render.

    Args:
        registry: Where the scans are.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._written: dict[str, _Written] = {}  # by model
        self._pieces = _together({})

    def render(self, view: View) -> list[str]:
        """Returns the series, from last time if no plan has changed since. Blocking."""
        # Records are never changed, only replaced: the same plan is the same object.
        written = {
            model.name: known
            for model in view.models
            if (known := self._written.get(model.name)) and known.plan is model.plan
        }
        try:
            for model in view.models:
                known, config = written.get(model.name), view.configs.get(model.name)
                if model.plan and (known is None or config not in (None, known.config)):
                    lines = self._lines(model.name, model.plan, config)
                    written[model.name] = _Written(model.plan, config, lines)
        except NotReadyError as error:
            logger.warning("new plans have no series yet: %s", error.message)
        if written != self._written:
            self._written, self._pieces = written, _together(written)
        return self._pieces

    def _lines(self, model: str, plan: Json, config: ModelConfig | None) -> dict[str, str]:
        lines: defaultdict[str, list[str]] = defaultdict(list)
        for name, labels, value in (*_planned(plan, config), *self._scanned(plan)):
            lines[name].append(f"{series(name, {'model': model, **labels})} {value}\n")
        return {name: "".join(of_family) for name, of_family in lines.items()}

    def _scanned(self, plan: Json) -> list[_Sample]:
        """Returns what the scan says of each block."""
        if not plan["donor_fingerprint"]:
            return []
        report = self._registry.scan(plan["donor_fingerprint"], plan["variant_fingerprint"])
        if report is None:
            return []
        try:
            return [
                _Sample(name, {"block": str(int(row["index"]))}, float(row[field]))
                for name, field in _SCANNED.items()
                for row in report["blocks"]
            ]
        except (KeyError, TypeError, ValueError):
            logger.warning("a stored scan is incomplete; its blocks have no series")
            return []


def _together(written: dict[str, _Written]) -> list[str]:
    """Returns the lines of all models, family by family."""
    pieces: list[str] = []
    for name in _FAMILIES:
        pieces.append(header(FAMILIES[name]))
        pieces.extend(model.lines.get(name, "") for model in written.values())
    return pieces


def _planned(plan: Json, config: ModelConfig | None) -> list[_Sample]:
    """Returns what a plan says, or nothing of one that is damaged: it must spoil no scrape."""
    try:
        samples = list(_samples(plan, config))
        if all(isinstance(sample.value, (int, float)) for sample in samples):
            return samples
    except (AttributeError, KeyError, TypeError):
        pass
    logger.warning("a stored plan is damaged; it has no series")
    return []


def _samples(plan: Json, config: ModelConfig | None) -> Iterator[_Sample]:
    for rung in COARSE:
        yield _Sample("linker_model_blocks", {"rung": rung}, plan["blocks"][rung])
    for kind in KINDS:
        held = plan["rung_bytes"].get(kind, 0)
        yield _Sample("linker_model_rung_bytes", {"rung": kind}, held)
    yield _Sample("linker_model_bits_per_weight", {}, plan["bits_per_weight"])
    yield from _price(plan)
    parts = _parts(plan, config)
    for block in parts.blocks:
        place = {"block": str(block.index)}
        yield _Sample("linker_block_rung", {**place, "rung": block.rung}, 1)
        if block.unique_bytes is not None:
            yield _Sample("linker_block_unique_bytes", place, block.unique_bytes)
    for section, nbytes in (parts.sections or {}).items():
        yield _Sample("linker_section_unique_bytes", {"section": section.value}, nbytes)


def _price(plan: Json) -> Iterator[_Sample]:
    # What came with a delta is its exporter's claim.
    if plan["price"] is None or plan["policy"] == Policy.DELTA:
        return
    for name, field in _PRICES.items():
        yield _Sample(name, {}, plan["price"][field])
    if plan["budget_kl"] is not None:
        yield _Sample("linker_plan_budget_kl_nats", {}, plan["budget_kl"])


def _parts(plan: Json, config: ModelConfig | None) -> PlanParts:
    try:
        return parts_of(plan, config)
    except (AttributeError, KeyError, TypeError, ValueError):
        logger.warning("a stored plan is incomplete; its blocks have no series")
        return PlanParts([], None)
