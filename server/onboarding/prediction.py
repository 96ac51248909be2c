"""What loading a model will take of the device, from plans alone. Moves nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from linker_core.errors import NotReadyError
from linker_core.sharing.plan import Policy
from linker_core.sharing.rungs import Rung
from linker_core.weights.architecture import DTYPE_BYTES, ModelConfig
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME, parse_key
from linker_core.weights.shapes import expected_tensors
from server.onboarding.adapters import AdapterSide, Source
from server.residency.catalog import Catalog, ServedModel
from server.residency.rows import Rows

Rungs = Mapping[str, object]  # tensor -> its rung, or its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes of the device that have to be free for a model."""

    unique: int  # what only it will reach
    base: int = 0  # tensors of its family's base that are not on the device
    kv: int = 0  # a new family's KV cache
    donor: int = 0  # what its unloaded donor takes, which comes back first

    @property
    def total(self) -> int:
        """All of them."""
        return self.unique + self.base + self.kv + self.donor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Home:
    """The family that a model comes to."""

    base: ModelConfig
    resident: tuple[Rungs, ...] | None  # of those who hold parts of the base; None: it is whole
    donor_bytes: int  # to be there for the donor's return; 0 where it is resident


class Prediction:
    """Reckons what models need, from what is resident and what is known of the rest.

    Args:
        catalog: The resident models.
        rows: Have the plans.
        kv_bytes: What the KV cache of a family takes.
    """

    def __init__(
        self, *, catalog: Catalog, rows: Rows, kv_bytes: Callable[[ModelConfig], int]
    ) -> None:
        self._catalog = catalog
        self._rows = rows
        self._kv_bytes = kv_bytes

    def of_variant(self, rungs: Rungs, unique_bytes: int, donor: str) -> Needs:
        """Returns what a variant needs.

        Args:
            rungs: Its plan's.
            unique_bytes: Its plan's.
            donor: Resident, or known since it was.

        Raises:
            NotReadyError: Nothing is known of the donor any more.
        """
        home = self._home(donor)
        missing = 0
        if home.resident is not None:
            missing = missing_base_bytes(rungs, home.base, home.resident)
        return Needs(unique=unique_bytes, base=missing, donor=home.donor_bytes)

    def of_head(
        self, rungs: Rungs, unique_bytes: int, config: ModelConfig, base: ModelConfig | None
    ) -> Needs:
        """Returns what a model without a donor needs, with which a family comes.

        Args:
            rungs: Its plan's.
            unique_bytes: Its plan's.
            config: Its shape.
            base: The shape of the checkpoint that its family shares; None: its own.
        """
        missing = 0 if base is None else missing_base_bytes(rungs, base, ())
        return Needs(unique=unique_bytes, base=missing, kv=self._kv_bytes(config))

    def at_least(self, source: Source, policy: str, donor: str | None) -> int:
        """Returns what a model needs even if it can share all that may be shared.

        Args:
            source: The model, not scanned yet.
            policy: What decides what it shares.
            donor: Resident, or known since it was; None: it would be one.

        Raises:
            NotReadyError: Nothing is known of the donor any more.
        """
        if donor is None:
            if isinstance(source, AdapterSide):
                return 0  # nobody knows its base yet
            return source.checkpoint_bytes + self._kv_bytes(source.config)
        home = self._home(donor)
        if isinstance(source, AdapterSide):
            # Its factors are small, and may be of another type.
            all_shared = dict.fromkeys(expected_tensors(home.base), Rung.ALIAS)
            return self.of_variant(all_shared, 0, donor).total
        if source.delta is not None:
            return self.of_variant(source.delta.rungs, source.delta.unique_bytes, donor).total
        # BS Eq. 3 shares blocks alone; under other policies the rest may be the donor's too.
        blocks_alone = policy == Policy.THRESHOLDS
        own_bytes = source.outside_blocks_bytes if blocks_alone else 0
        return own_bytes + home.donor_bytes + _least_missing(source.config, home, blocks_alone)

    def _home(self, donor: str) -> _Home:
        head = self._catalog.get(donor)
        if head is not None:
            names = [donor, *self._catalog.dependants(donor)]
            return _home_of(head, tuple(self._rungs(name) for name in names), donor_bytes=0)
        head = self._catalog.dormant(donor)
        if head is None:
            raise NotReadyError(f"The donor {donor!r} has left meanwhile; try again.")
        record = self._rows.find(donor)
        plan = None if record is None else record.plan
        rungs = self._rungs(donor)
        unique_bytes = 0 if plan is None else plan["unique_bytes"]
        base = None if head.base is None else head.base.text.config
        needs = self.of_head(rungs, unique_bytes, head.text.config, base)
        return _home_of(head, (rungs,), donor_bytes=needs.total)

    def _rungs(self, name: str) -> Rungs:
        record = self._rows.find(name)
        plan = None if record is None else record.plan
        return {} if plan is None else plan["rungs"]


def _home_of(head: ServedModel, resident: tuple[Rungs, ...], *, donor_bytes: int) -> _Home:
    return _Home(
        base=head.lender.text.config,
        resident=None if head.base is None else resident,
        donor_bytes=donor_bytes,
    )


def missing_base_bytes(rungs: Rungs, base: ModelConfig, resident: Iterable[Rungs]) -> int:
    """Returns what a plan needs of its base that no resident model of the family has there.

    Args:
        rungs: The plan's.
        base: The shape of the checkpoint that the family shares.
        resident: The rungs of the family's resident models, none of which is the base itself.
    """
    there = {name for rungs in resident for name in _of_base(rungs, base)}
    missing = _of_base(rungs, base) - there
    return sum(
        math.prod(shape) * DTYPE_BYTES[base.dtype]
        for name, shape in expected_tensors(base).items()
        if name in missing
    )


def _of_base(rungs: Rungs, base: ModelConfig) -> set[str]:
    """Returns the base's tensors that are read: those of all but a model's own."""
    names = {name for name, rung in rungs.items() if str(rung) != Rung.OWN.value}
    if base.tie_word_embeddings and LM_HEAD_NAME in names:
        return names - {LM_HEAD_NAME} | {EMBED_NAME}
    return names


def _least_missing(config: ModelConfig, home: _Home, blocks_alone: bool) -> int:
    """Returns the least that a variant takes for what its family does not have on the device.

    Such a tensor it either shares, so that the base's comes back, or has for itself.
    """
    if home.resident is None:
        return 0
    there = {name for rungs in home.resident for name in _of_base(rungs, home.base)}
    base = expected_tensors(home.base)
    item_bytes = min(DTYPE_BYTES[home.base.dtype], DTYPE_BYTES[config.dtype])
    return sum(
        min(math.prod(shape), math.prod(base[name])) * item_bytes
        for name, shape in expected_tensors(config).items()
        if name in base and name not in there and (not blocks_alone or _in_block(name))
    )


def _in_block(name: str) -> bool:
    key = parse_key(name)
    return key is not None and key.layer is not None
