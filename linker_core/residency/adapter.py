"""Turns a LoRA adapter into a delta to its base: each pair of factors a low-rank rung, no scan.

Legend: O rows and I width of a weight, r rank.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from linker_core.errors import BadCheckpointError
from linker_core.pace import Pace
from linker_core.residency.delta_entries import EntryWriter
from linker_core.residency.delta_writer import is_written, write_stored
from linker_core.residency.new_folder import new_folder
from linker_core.residency.reading import TORCH_DTYPES
from linker_core.residency.rounding import rounded
from linker_core.residency.stored import StoredResidual, StoredTensor
from linker_core.residency.texts import adapter_texts, copy_texts
from linker_core.sharing.delta_layout import DELTA_FILE, entries_of
from linker_core.sharing.plan import (
    Policy,
    SharePlan,
    count_blocks,
    count_weights,
    plan_bytes,
)
from linker_core.sharing.rungs import AnyRung, Residual, Rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.lora import LoraAdapter, LoraPair
from linker_core.weights.safetensors_header import TensorInfo

_FACTOR_BITS = 16


class _Factors(NamedTuple):
    """upᵀ down is what the weight gains, float32."""

    down_rI: torch.Tensor
    up_rO: torch.Tensor


def write_adapter(
    path: Path,
    donor: Checkpoint,
    target: Path,
    *,
    donor_fingerprint: str,
    progress: Callable[[int, int], None] | None = None,
    pace: Pace | None = None,
) -> None:
    """Writes the delta folder of an adapter on its base; what it does not change is an alias.

    Factors stay factors, whatever their rank: where they take more bytes than the merged weight,
    that would lose what it rounds away of a small product, and the adapter would answer otherwise.

    The tokenizer and the chat template are the adapter's where it has its own. A target that holds
    the same adapter's delta already is left as it is.

    Args:
        path: The adapter's folder.
        donor: The base.
        target: The folder to make, in one that exists.
        donor_fingerprint: The base's.
        progress: Called with bytes of factors done and in all.
        pace: Holds back while sequences run.

    Raises:
        UnsupportedFormatError: An adapter of a kind that is not served.
        BadCheckpointError: It does not fit the base, is damaged, not finite, or changed meanwhile.
        InvalidRequestError: A target out of reach.
        ConflictError: The target exists and is something else.
        InsufficientCapacityError: The disk is full.
    """
    with LoraAdapter.open(path, donor.config) as adapter:
        identity = adapter.identity
        plan = _plan(adapter, donor, donor_fingerprint)
        if is_written(plan, target):
            return
        total = sum(pair.a.nbytes + pair.b.nbytes for pair in adapter.pairs.values())
        done, pace = 0, pace or Pace()
        with new_folder(target) as folder:
            copy_texts(adapter_texts(path, donor.path), folder)
            with _entry_writer(folder / DELTA_FILE, plan, donor) as writer:
                for name, pair in adapter.pairs.items():
                    started = time.monotonic()
                    with pace.turn():
                        write_stored(writer, name, _stored(name, pair, adapter, donor))
                    done += pair.a.nbytes + pair.b.nbytes
                    if progress is not None:
                        progress(done, total)
                    pace.after_work(time.monotonic() - started)
            if identity != adapter.identity:
                raise BadCheckpointError(
                    "The adapter's weight file changed while the delta was made of it. Leave it "
                    "alone meanwhile, and try again."
                )


def _plan(adapter: LoraAdapter, donor: Checkpoint, donor_fingerprint: str) -> SharePlan:
    rungs: dict[str, AnyRung] = dict.fromkeys(donor.tensors, Rung.ALIAS)
    for name, pair in adapter.pairs.items():
        rank = min(pair.rank, *donor.tensors[name].shape)
        rungs[name] = Residual(rank=rank, factor_bits=_FACTOR_BITS)
    size = plan_bytes(rungs, {}, donor=donor, variant=donor)
    return SharePlan(
        policy=Policy.ADAPTER,
        tau_cos=None,
        tau_frob=None,
        threshold_source=None,
        donor_fingerprint=donor_fingerprint,
        variant_fingerprint=_fingerprint(adapter, donor_fingerprint),
        rungs=rungs,
        own_rows={},
        logical_bytes=size.logical_bytes,
        unique_bytes=size.unique_bytes,
        rung_bytes=size.rung_bytes,
        num_weights=count_weights(donor),
        checkpoint_bytes=donor.nbytes,
        blocks=count_blocks(rungs, donor),
        price=None,
        budget_kl=None,
        mean_cos=None,
        mean_epsilon=None,
        region=None,
    )


def _fingerprint(adapter: LoraAdapter, donor_fingerprint: str) -> str:
    """Returns SHA-256 over the base's fingerprint and all that the merged weights depend on."""
    digest = hashlib.sha256(donor_fingerprint.encode())
    for name, pair in adapter.pairs.items():
        form = [name, pair.scaling, *((f.dtype, f.shape) for f in (pair.a, pair.b))]
        digest.update(b"\n" + json.dumps(form).encode() + b"\n")
        for factor in (pair.a, pair.b):
            digest.update(adapter.read(factor))
    return digest.hexdigest()


def _entry_writer(path: Path, plan: SharePlan, donor: Checkpoint) -> EntryWriter:
    entries = [
        entry
        for name, rung in plan.rungs.items()
        for entry in entries_of(
            name, rung, donor.tensors[name].shape, donor.tensors[name].dtype, num_rows=0
        )
    ]
    return EntryWriter(path, entries, plan)


def _stored(name: str, pair: LoraPair, adapter: LoraAdapter, donor: Checkpoint) -> StoredResidual:
    info = donor.tensors[name]
    factors = _folded(_read(adapter, pair.a), _read(adapter, pair.b), pair)
    try:
        down, up = (rounded(part, bits=_FACTOR_BITS, group=part.shape[1]) for part in factors)
    except BadCheckpointError as error:
        raise BadCheckpointError(f"{name}: the adapter's factors are not finite.") from error
    nothing = torch.empty(0, info.shape[1], dtype=TORCH_DTYPES[info.dtype])
    base = StoredTensor(tensor=nothing)  # the file holds the delta alone
    return StoredResidual(base=base, dense=None, down=down, up=up, extra=nothing)


def _read(adapter: LoraAdapter, factor: TensorInfo) -> torch.Tensor:
    words = torch.frombuffer(adapter.read(factor), dtype=TORCH_DTYPES[factor.dtype])
    return words.view(factor.shape).float()


def _folded(a: torch.Tensor, b: torch.Tensor, pair: LoraPair) -> _Factors:
    """Puts the scaling into the factor where rounding to bfloat16 then does the least harm.

    Factors that are bfloat16 already are rounded on one side only, or on none.
    """
    plain = _Factors(b.T, a) if pair.transposed else _Factors(a, b.T)
    rank, rows, width = len(plain.down_rI), plain.up_rO.shape[1], plain.down_rI.shape[1]
    if rank > min(rows, width):
        return _square(plain, pair.scaling)
    choices = (
        _Factors(plain.down_rI * pair.scaling, plain.up_rO),
        _Factors(plain.down_rI, plain.up_rO * pair.scaling),
    )
    return min(choices, key=_rounding_error)


def _square(plain: _Factors, scaling: float) -> _Factors:
    """Returns factors of full rank, one of them the identity, in the place of more than that."""
    gained_OI = plain.up_rO.T @ plain.down_rI * scaling
    rows, width = gained_OI.shape
    if width <= rows:
        return _Factors(torch.eye(width), gained_OI.T)
    return _Factors(gained_OI, torch.eye(rows))


def _rounding_error(factors: _Factors) -> float:
    """Returns |upᵀ down - rounded|², from products of 2r x 2r alone."""
    exact = [part.double() for part in factors]
    kept = [part.bfloat16().double() for part in factors]
    downs, ups = torch.cat([exact[0], -kept[0]]), torch.cat([exact[1], kept[1]])
    return float(((downs @ downs.T) * (ups @ ups.T)).sum())
