"""Two checkpoints -> ScanReport: cos and ε of every block (BS Eq. 1, 2), sums of every tensor."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from linker_core.errors import BadCheckpointError
from linker_core.pace import Pace
from linker_core.sharing.family import check_same_family
from linker_core.sharing.pieces import (
    Findings,
    Piece,
    comparable,
    counts_rows,
    single_pieces,
    whole_pieces,
)
from linker_core.sharing.report import BlockScan, ScanReport
from linker_core.sharing.similarity import PairSums
from linker_core.sharing.sweep import Progress, piece_bytes, sweep
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import Section, parse_key

_CUDA_SWEEP = "linker_core.sharing.cuda_sweep"  # needs torch, which a scan on the CPU does not
Sweep = Callable[..., Findings]


def scan(
    donor: Checkpoint,
    variant: Checkpoint,
    *,
    progress: Progress | None = None,
    pace: Pace | None = None,
    mapped: bool = False,
    device: str = "cpu",
) -> ScanReport:
    """Compares every tensor that both have in the same shape, and looks at all others.

    Args:
        donor: The model whose storage would be aliased.
        variant: The model that would alias it.
        progress: Called, maybe from several threads, with bytes read and bytes to read.
        pace: Holds back while sequences run.
        mapped: See `sweep`: only for a process that a damaged file may end.
        device: "cpu", or a CUDA device that computes the sums.

    Raises:
        BadCheckpointError: Different families, NaN or infinite weights, or a file that changed.
    """
    check_same_family(donor.config, variant.config)
    started = time.monotonic()
    pieces = [piece for name in variant.tensors for piece in whole_pieces(donor, variant, name)]
    findings = choose_sweep(device)(
        pieces, donor, variant, mapped=mapped, pace=pace or Pace(), progress=progress
    )
    refuse_nonfinite(pieces, findings, donor, variant)
    numbers = numbers_by_name(pieces)
    sums = {
        name: whole_sums(pieces, findings, numbers[name])
        for name in variant.tensors
        if comparable(donor, variant, name)
    }
    return ScanReport(
        donor=str(donor.path),
        variant=str(variant.path),
        bytes_read=sum(piece_bytes(piece, donor, variant) for piece in pieces),
        scan_seconds=time.monotonic() - started,
        blocks=tuple(
            BlockScan(index=index, params=params)
            for index, params in enumerate(block_params(variant.config, sums))
        ),
        outside_blocks={name: pair for name, pair in sums.items() if is_outside_blocks(name)},
        identical_rows={
            name: sum(findings.equal_rows[number] for number in numbers[name])
            for name in variant.tensors
            if counts_rows(donor, variant, name)
        },
    )


def check_finite(
    checkpoint: Checkpoint,
    *,
    progress: Progress | None = None,
    pace: Pace | None = None,
    mapped: bool = False,
) -> None:
    """Refuses a checkpoint with NaN or infinite weights; arguments as in `scan`.

    Raises:
        BadCheckpointError: Names the first such tensor.
    """
    pieces = list(single_pieces(checkpoint))
    findings = sweep(
        pieces, checkpoint, checkpoint, mapped=mapped, pace=pace or Pace(), progress=progress
    )
    refuse_nonfinite(pieces, findings, checkpoint, checkpoint)


def choose_sweep(device: str) -> Sweep:
    """Returns what goes over the pieces on this device."""
    if device == "cpu":
        return sweep
    chosen: Sweep = importlib.import_module(_CUDA_SWEEP).sweep_on(device)
    return chosen


def numbers_by_name(pieces: Sequence[Piece]) -> dict[str, list[int]]:
    """Returns the numbers of each tensor's pieces."""
    numbers: dict[str, list[int]] = {}
    for number, piece in enumerate(pieces):
        numbers.setdefault(piece.name, []).append(number)
    return numbers


def whole_sums(pieces: Sequence[Piece], findings: Findings, numbers: Iterable[int]) -> PairSums:
    """Adds up the pieces that cover one tensor."""
    numbers = list(numbers)
    rows = [findings.piece_sums(number) for number in numbers]
    dot, donor_square, variant_square, delta_square = map(math.fsum, zip(*rows, strict=True))
    return PairSums(
        dot=dot,
        donor_square=donor_square,
        variant_square=variant_square,
        delta_square=delta_square,
        identical=all(findings.identical[number] for number in numbers),
        count=sum(pieces[number].length for number in numbers),
    )


def block_params(config: ModelConfig, sums: Mapping[str, PairSums]) -> list[dict[str, PairSums]]:
    """Returns sub-parameter -> sums of each block."""
    params: list[dict[str, PairSums]] = [{} for _ in range(config.num_layers)]
    for name, pair in sums.items():
        key = parse_key(name)
        assert key is not None
        if key.layer is not None:
            params[key.layer][key.parameter] = pair
    return params


def is_outside_blocks(name: str) -> bool:
    """Returns whether a tensor is embedding, final norm or head."""
    key = parse_key(name)
    assert key is not None
    return key.section is not Section.BLOCKS


def refuse_nonfinite(
    pieces: Sequence[Piece], findings: Findings, donor: Checkpoint, variant: Checkpoint
) -> None:
    """Refuses what was seen to have NaN or infinite weights.

    Raises:
        BadCheckpointError: Names the first such tensor, the donor's before the variant's.
    """
    for checkpoint, counts in (
        (donor, findings.donor_nonfinite),
        (variant, findings.variant_nonfinite),
    ):
        found: dict[str, int] = {}
        for piece, count in zip(pieces, counts, strict=True):
            found[piece.name] = found.get(piece.name, 0) + count
        for name, count in found.items():
            if count:
                file = checkpoint.shard_names[checkpoint.tensors[name].shard]
                raise BadCheckpointError(
                    f"{file}: tensor {name} has NaN or infinite weights ({count} seen). The "
                    "training run that wrote it diverged; export an earlier step."
                )
