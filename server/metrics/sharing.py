"""What plans share and cost, block by block, rendered once for as long as the plans are the same.

Fifty models are thousands of series; making their text at every scrape would take longer than all
the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from linker_core.errors import NotReadyError
from linker_core.sharing.plan import Policy
from linker_core.sharing.rungs import COARSE, CODE_BITS, GROUPS, Residual, Rung
from server.registry.records import Json, ModelRecord
from server.registry.store import Registry

logger = logging.getLogger(__name__)

_DENSE = [Residual(bits=bits, group=GROUPS[0]).kind for bits in CODE_BITS]
_LOW_RANK = Residual(rank=1, factor_bits=8).kind
# What a model's unique bytes are in; an alias has none.
_KINDS = (
    *(Rung.ROWS.value, _LOW_RANK, *_DENSE),
    *(f"{_LOW_RANK}+{dense}" for dense in _DENSE),
    Rung.OWN.value,
)
_PRICES = (
    ("linker_plan_kl_nats", "kl", "Measured KL(variant || planned) per response token."),
    (
        "linker_plan_top1_agreement_ratio",
        "top1",
        "Measured share of response tokens where plan and variant prefer the same token.",
    ),
    (
        "linker_plan_perplexity_ratio",
        "ppl_ratio",
        "Perplexity under the plan over that of the variant.",
    ),
)


class _Block(NamedTuple):
    number: int
    cos: float
    epsilon: float


_Plans = dict[str, Json]  # by model
_Scans = dict[str, Sequence[_Block]]  # by model


class SharingExposition:
    """The text of the sharing series of every known model. Any thread may ask for it.

    Args:
        models: Returns the known models.
        registry: Where the scans are.
    """

    def __init__(self, *, models: Callable[[], Sequence[ModelRecord]], registry: Registry) -> None:
        self._models = models
        self._registry = registry
        self._rendered: tuple[_Plans, _Scans, bytes] = ({}, {}, generate_latest(_Sharing({}, {})))

    def render(self) -> bytes:
        """Returns the series, from last time if no plan has changed since."""
        plans = {model.name: model.plan for model in self._models() if model.plan}
        known, scans, text = self._rendered
        # Records are never changed, only replaced: the same plan is the same object.
        if known.keys() == plans.keys() and all(known[m] is plan for m, plan in plans.items()):
            return text
        try:
            scans = {m: self._scan(plan) for m, plan in plans.items() if plan["donor_fingerprint"]}
        except NotReadyError as error:
            logger.warning("new plans have no series yet: %s", error.message)
            plans = {model: plan for model, plan in plans.items() if known.get(model) is plan}
            scans = {model: blocks for model, blocks in scans.items() if model in plans}
        text = generate_latest(_Sharing(plans, scans))
        self._rendered = plans, scans, text
        return text

    def _scan(self, plan: Json) -> Sequence[_Block]:
        report = self._registry.scan(plan["donor_fingerprint"], plan["variant_fingerprint"])
        if report is None:
            return ()
        try:
            return [
                _Block(int(row["index"]), float(row["cos"]), float(row["epsilon"]))
                for row in report["blocks"]
            ]
        except (KeyError, TypeError, ValueError):
            logger.warning("a stored scan is incomplete; its blocks have no series")
            return ()


class _Sharing(Collector):
    def __init__(self, plans: _Plans, scans: _Scans) -> None:
        self._plans = plans
        self._scans = scans

    def collect(self) -> Iterator[Metric]:
        blocks = GaugeMetricFamily(
            "linker_model_blocks",
            "Blocks by the rung they are stored at.",
            labels=["model", "rung"],
        )
        for model, plan in self._plans.items():
            for rung in COARSE:
                blocks.add_metric([model, rung], plan["blocks"][rung])
        yield blocks
        yield from self._sizes()
        yield from self._prices()
        yield self._blocks("linker_block_cosine", "cos", "Cosine of a block and the donor's.")
        yield self._blocks(
            "linker_block_epsilon",
            "epsilon",
            "Relative Frobenius distance of a block from the donor's.",
        )

    def _sizes(self) -> Iterable[Metric]:
        held = GaugeMetricFamily(
            "linker_model_rung_bytes",
            "Bytes that only the model holds, by the kind of rung they are on.",
            labels=["model", "rung"],
        )
        bits = GaugeMetricFamily(
            "linker_model_bits_per_weight",
            "Bits that only the model holds for each of its weights.",
            labels=["model"],
        )
        for model, plan in self._plans.items():
            for kind in _KINDS:
                held.add_metric([model, kind], plan["rung_bytes"].get(kind, 0))
            bits.add_metric([model], plan["bits_per_weight"])
        yield from (held, bits)

    def _prices(self) -> Iterable[Metric]:
        for name, field, what in _PRICES:
            family = GaugeMetricFamily(name, what, labels=["model"])
            for model, plan in self._plans.items():
                # What came with a delta is its exporter's claim.
                if plan["price"] is not None and plan["policy"] != Policy.DELTA:
                    family.add_metric([model], plan["price"][field])
            yield family

    def _blocks(self, name: str, field: str, what: str) -> Metric:
        family = GaugeMetricFamily(name, what, labels=["model", "block"])
        for model, rows in self._scans.items():
            for row in rows:
                family.add_metric([model, str(row.number)], getattr(row, field))
        return family
