"""Writes a variant as a delta to its donor, a few tensors at a time, in bounded memory."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from linker_core.errors import BadCheckpointError, ConflictError, InvalidRequestError
from linker_core.pace import Pace
from linker_core.residency.delta_entries import EntryWriter
from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.encoding_memory import at_once_bytes, tensor_bytes
from linker_core.residency.loader import read_tensor
from linker_core.residency.new_folder import new_folder
from linker_core.residency.own_rows import load_rows
from linker_core.residency.reading import FileRows
from linker_core.residency.stored import StoredResidual, StoredRows, StoredTensor
from linker_core.residency.texts import checkpoint_texts, copy_texts
from linker_core.sharing.delta import DeltaFile, is_delta
from linker_core.sharing.delta_layout import DELTA_FILE, Entry, entries_of
from linker_core.sharing.delta_plan import is_legal
from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import AnyRung, Residual, Rung
from linker_core.weights.checkpoint import Checkpoint

_CPU = torch.device("cpu")

Progress = Callable[[int, int], None]


def write_delta(
    plan: SharePlan,
    donor: Checkpoint,
    variant: Checkpoint,
    target: Path,
    *,
    progress: Progress | None = None,
    pace: Pace | None = None,
) -> None:
    """Writes a folder that holds everything of the variant that is not an alias, and its texts.

    Memory holds `encoding_bytes` at most. A target that holds the same plan's delta already is left
    as it is.

    Args:
        plan: Of these two checkpoints.
        donor: Whose tensors the deltas are to.
        variant: What is written.
        target: The folder to make, in one that exists.
        progress: Called with bytes of the variant done and in all.
        pace: Holds back while sequences run.

    Raises:
        BadCheckpointError: The plan is of other checkpoints, a delta is not finite, a file changed.
        InvalidRequestError: A rung that a delta file cannot have, or a target out of reach.
        ConflictError: The target exists and is something else.
        InsufficientCapacityError: The disk is full.
    """
    if is_written(plan, target):
        return
    sources = _sources(plan, donor, variant)
    total = sum(source.nbytes for source in sources)
    entries = [entry for source in sources for entry in source.entries]
    identities, pace = (donor.identity, variant.identity), pace or Pace()
    with new_folder(target) as folder:
        copy_texts(checkpoint_texts(variant.path), folder)
        with EntryWriter(folder / DELTA_FILE, entries, plan) as writer:

            def write(source: _Source) -> None:
                started = time.monotonic()
                with pace.turn():
                    if source.rung is Rung.OWN:
                        writer.copy(source.name, variant)
                    else:
                        stored = _encoded(source, plan, donor, variant)
                        write_stored(writer, source.name, stored)
                pace.after_work(time.monotonic() - started)
                pace.after_read(2 * source.nbytes)

            limit, done = at_once_bytes(plan, donor.tensors, variant.tensors), 0
            with closing(
                _all_written(sources, write, limit)
            ) as written:  # no thread outlives the writer
                for nbytes in written:
                    done += nbytes
                    if progress is not None:
                        progress(done, total)
        if identities != (donor.identity, variant.identity):
            raise BadCheckpointError(
                "A weight file changed while the delta was made of it. Leave the checkpoints alone "
                "meanwhile, and try again."
            )


def write_stored(writer: EntryWriter, name: str, stored: StoredRows | StoredResidual) -> None:
    """Puts a tensor's entries into a file."""
    if isinstance(stored, StoredRows):
        writer.put(f"{name}.rows", stored.own)
        writer.put(f"{name}.positions", stored.positions)
    else:
        for part, matrix in (("dense", stored.dense), ("down", stored.down), ("up", stored.up)):
            if matrix is not None:
                writer.put(f"{name}.{part}.codes", matrix.codes_RB)
                if matrix.bits < 16:
                    writer.put(f"{name}.{part}.scales", matrix.scales_RG)
        writer.put(f"{name}.extra", stored.extra)


def is_written(plan: SharePlan, target: Path) -> bool:
    """Returns whether the target is complete already, by its header: its data is not read.

    Raises:
        ConflictError: It is something else.
    """
    if not is_delta(target):
        return False  # if anything is there, it is refused where the folder is made
    with DeltaFile.open(target) as written:
        if written.plan.to_json() == plan.to_json():
            return True
    raise ConflictError(
        f"{target.name} holds the delta of another plan. Name another folder, or remove it.",
        param="target",
    )


class _Source(NamedTuple):
    name: str
    rung: AnyRung
    nbytes: int  # of the variant's tensor
    needs: int  # bytes of memory, while it is written
    entries: list[Entry]


def _all_written(
    sources: list[_Source], write: Callable[[_Source], None], limit: int
) -> Generator[int, None, None]:
    """Writes tensors in as many threads as torch has, the largest first; each by one thread.

    Args:
        sources: What to write.
        write: Writes one.
        limit: Bytes that those in the making may take together.

    Yields:
        Bytes of each tensor that is done.
    """
    waiting = deque(sorted(sources, key=lambda source: -source.needs))
    running: dict[Future[None], _Source] = {}
    threads, needs = torch.get_num_threads(), 0
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < threads and needs + waiting[0].needs <= limit:
                    source = waiting.popleft()
                    running[pool.submit(write, source)] = source
                    needs += source.needs
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    source = running.pop(future)
                    needs -= source.needs
                    future.result()
                    yield source.nbytes
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # a thread's number is also the next one's to start


def _sources(plan: SharePlan, donor: Checkpoint, variant: Checkpoint) -> list[_Source]:
    """Returns the tensors that are not aliases, with what is to be stored of each.

    Raises:
        BadCheckpointError: The plan is of other checkpoints.
        InvalidRequestError: A rung that a delta file cannot have.
    """
    if plan.rungs.keys() != variant.tensors.keys():
        raise BadCheckpointError("The plan lists other tensors than the checkpoint. Scan it again.")
    sources = []
    for name, rung in plan.rungs.items():
        info, base = variant.tensors[name], donor.tensors.get(name)
        common = (
            info.shape if base is None else (min(info.shape[0], base.shape[0]), *info.shape[1:])
        )
        if not is_legal(name, rung, common):
            raise InvalidRequestError(
                f"{name} of shape {list(info.shape)} cannot be on rung {rung}.", param="rungs"
            )
        if rung is not Rung.OWN and (base is None or base.shape[1:] != info.shape[1:]):
            raise BadCheckpointError(f"The donor has no {name} that rung {rung} could build on.")
        num_rows = plan.own_rows.get(name, 0)
        if isinstance(rung, Residual):
            assert base is not None
            num_rows = max(0, info.shape[0] - base.shape[0])
        entries = entries_of(name, rung, info.shape, info.dtype, num_rows=num_rows)
        if entries:
            needs = tensor_bytes(rung, info, base, num_own=num_rows)
            sources.append(_Source(name, rung, info.nbytes, needs, entries))
    return sources


def _encoded(
    source: _Source, plan: SharePlan, donor: Checkpoint, variant: Checkpoint
) -> StoredRows | StoredResidual:
    """Reads a tensor of both and returns what the delta holds of it."""
    name, rung = source.name, source.rung
    if isinstance(rung, Residual):
        variant_OI, base_OI = FileRows(variant, name), FileRows(donor, name)
        nothing = StoredTensor(tensor=torch.empty(0, base_OI.shape[1]))  # the delta alone counts
        seed = zlib.crc32(name.encode())
        encoder = DeltaEncoder(nothing, variant_OI, seed=seed, base_OI=base_OI)
        try:
            return encoder.encode(rung)
        except BadCheckpointError as error:
            raise BadCheckpointError(f"{name}: {error.message}") from error
    base = StoredTensor(tensor=read_tensor(donor, name, device=_CPU))
    loading = load_rows(variant, name, base, num_own=plan.own_rows[name])
    while True:
        try:
            next(loading)
        except StopIteration as end:
            rows: StoredRows = end.value
            return rows
