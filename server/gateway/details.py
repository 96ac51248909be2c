"""What a model's card says more of, if asked: blocks, tensors, and the plans that were priced.

All of it is read from the registry's rows, off the event loop; no checkpoint is opened. What is
missing or damaged is None.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from linker_core.sharing.plan_blocks import PlanBlock, parts_of
from linker_core.sharing.price import Price
from linker_core.sharing.similarity import PairSums
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.keys import Section, block_name, parse_key
from server.onboarding.stored import restored
from server.registry.records import Json, ModelRecord
from server.registry.store import Registry
from server.residency.catalog import Catalog

Listed = Literal["blocks", "frontier"]  # of every model at once
Detail = Literal["blocks", "frontier", "tensors"]
_SECTIONS = tuple(Section)
_UNKNOWN = None, None  # cos and ε
_Rows = list[dict[str, Any]]


def of_many(what: object) -> object:
    """Returns what is asked for of every model at once; says where what is of one is to be had.

    Raises:
        ValueError: It is of one model.
    """
    if what == "tensors":
        raise ValueError(
            "tensors are of one model, GET /models/{name}?include=tensors; of all of them there "
            "are 'blocks' or 'frontier'"
        )
    return what


class _Source(NamedTuple):
    """What details are made from; while none of it is another object, they stay the same."""

    plan: Json
    config: ModelConfig | None  # None: the model's shapes are not known at the moment


class _Kept(NamedTuple):
    """What is read, or has been, for all who ask meanwhile."""

    source: _Source
    reading: asyncio.Task[_Rows | None]


class Details:
    """Looks details up, and keeps those that lists ask for. Event loop only.

    Args:
        registry: Where scans and tunings are.
        catalog: Knows the shapes of models that are or were resident.
    """

    def __init__(self, registry: Registry, catalog: Catalog) -> None:
        self._registry = registry
        self._catalog = catalog
        self._kept: dict[tuple[str, Listed], _Kept] = {}

    async def of(self, record: ModelRecord, include: Collection[Detail]) -> dict[str, Any]:
        """Returns the details of a model that are asked for.

        Raises:
            NotReadyError: The registry cannot be read.
        """
        source = self._source(record)
        if source is None:
            self._forget(record.name)
            return dict.fromkeys(include)
        found: dict[str, Any] = {}
        for what in dict.fromkeys(include):  # once, however often it was said
            if what == "tensors":  # of one model, seldom, and much
                found[what] = await asyncio.to_thread(self._tensors, source)
            else:
                found[what] = await self._keeping(record.name, what, source)
        return found

    def keep(self, names: Collection[str]) -> None:
        """Forgets what is kept of other models than these."""
        for name, _ in list(self._kept):
            if name not in names:
                self._forget(name)

    def _source(self, record: ModelRecord) -> _Source | None:
        if record.plan is None:
            return None
        served = self._catalog.get(record.name) or self._catalog.dormant(record.name)
        return _Source(record.plan, None if served is None else served.text.config)

    async def _keeping(self, name: str, what: Listed, source: _Source) -> _Rows | None:
        kept = self._kept.get((name, what))
        # Plans are never changed, only replaced; to compare their thousands of rungs takes longer.
        if kept is None or any(a is not b for a, b in zip(kept.source, source, strict=True)):
            read = self._blocks if what == "blocks" else self._frontier
            reading = asyncio.ensure_future(asyncio.to_thread(read, source))
            kept = self._kept[name, what] = _Kept(source, reading)
            reading.add_done_callback(partial(self._note_read, name, what))
        return await asyncio.shield(kept.reading)  # others may wait for it when one leaves

    def _note_read(self, name: str, what: Listed, reading: asyncio.Task[_Rows | None]) -> None:
        """Keeps nothing of a reading that failed: whoever asks next tries again."""
        failed = reading.cancelled() or reading.exception() is not None
        kept = self._kept.get((name, what))
        if failed and kept is not None and kept.reading is reading:
            del self._kept[name, what]

    def _forget(self, name: str) -> None:
        self._kept.pop((name, "blocks"), None)
        self._kept.pop((name, "frontier"), None)

    def _blocks(self, source: _Source) -> _Rows | None:
        parts = restored(partial(parts_of, config=source.config), source.plan)
        if parts is None:
            return None
        means = restored(_block_means, self._scan(source.plan)) or {}
        return [_block(block, *means.get(block.index, _UNKNOWN)) for block in parts.blocks]

    def _tensors(self, source: _Source) -> _Rows | None:
        rungs: Mapping[str, str] = source.plan["rungs"]
        means = restored(_tensor_means, self._scan(source.plan)) or {}
        rows = [_tensor(name, rung, *means.get(name, _UNKNOWN)) for name, rung in rungs.items()]
        return sorted(rows, key=lambda row: (_SECTIONS.index(row["section"]), row["block"] or 0))

    def _frontier(self, source: _Source) -> _Rows | None:
        """Returns the plans among which a tuner found this one, or None where it was not tuned."""
        plan = source.plan
        if plan["donor_fingerprint"] is None or plan["price"] is None:
            return None

        def is_its(tuning: Json) -> bool:
            chosen = tuning.get("chosen")
            return chosen is not None and _rungs_and_price(chosen) == _rungs_and_price(
                {**plan["price"], "rungs": plan["rungs"]}
            )

        pair = plan["donor_fingerprint"], plan["variant_fingerprint"]
        tuning = self._registry.newest_tuning(*pair, where=lambda row: bool(restored(is_its, row)))
        return restored(partial(_points, plan["rungs"]), tuning)

    def _scan(self, plan: Json) -> Json | None:
        donor = plan["donor_fingerprint"]
        return donor and self._registry.scan(donor, plan["variant_fingerprint"])


def _block(block: PlanBlock, cos: float | None, epsilon: float | None) -> dict[str, Any]:
    return {
        "index": block.index,
        "cos": cos,
        "epsilon": epsilon,
        "rung": block.rung,
        "unique_bytes": block.unique_bytes,
    }


def _tensor(name: str, rung: str, cos: float | None, epsilon: float | None) -> dict[str, Any]:
    key = parse_key(name)
    assert key is not None, "plans are of supported models"
    return {
        "name": name,
        "section": key.section.value,
        "block": key.layer,
        "parameter": key.parameter,
        "cos": cos,
        "epsilon": epsilon,
        "rung": rung,
    }


def _block_means(report: Json) -> dict[int, tuple[float, float]]:
    """Returns cos and ε of every block of a scan."""
    rows = report["blocks"]
    return {int(row["index"]): (_finite(row["cos"]), _finite(row["epsilon"])) for row in rows}


def _tensor_means(report: Json) -> dict[str, tuple[float, float]]:
    """Returns cos and ε of every tensor that a scan has compared, by its name."""
    found: dict[str, Mapping[str, Any]] = dict(report["outside_blocks"])
    for block in report["blocks"]:
        for parameter, row in block["params"].items():
            found[block_name(block["index"], parameter)] = row
    fields = PairSums.__dataclass_fields__
    sums = {name: PairSums(**{key: row[key] for key in fields}) for name, row in found.items()}
    return {name: (_finite(each.cos), _finite(each.epsilon)) for name, each in sums.items()}


def _rungs_and_price(record: Json) -> tuple[dict[str, str], Price]:
    return dict(record["rungs"]), Price.from_json(record)


def _points(rungs: Mapping[str, str], tuning: Json) -> _Rows:
    """Returns the plans of a frontier, the one with these rungs marked."""
    return [
        {
            "origin": str(point["origin"]),
            "unique_bytes": int(point["unique_bytes"]),
            **{name: _finite(point[name]) for name in ("kl", "kl_upper", "top1", "ppl_ratio")},
            "rung_bytes": {str(kind): int(held) for kind, held in point["rung_bytes"].items()},
            "chosen": point["rungs"] == rungs,
        }
        for point in tuning["frontier"]
    ]


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):  # which no JSON can say
        raise ValueError("a stored number is not finite")
    return number
