"""A disposable process that hashes, scans and compares: `python -m linker_core.sharing.worker`.

Prints JSON lines on stdout: progress, then one result or one error; is told "busy" and "idle" on
stdin while it works. Holds no state; killing it at any moment harms nothing. It reads files through
maps, so a death without a result means that a file was cut short under its hands.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linker_core.errors import LinkerError
from linker_core.lifeline import die_with_parent
from linker_core.pace import Pace
from linker_core.sharing.closeness import measure_closeness
from linker_core.sharing.report import ScanReport
from linker_core.sharing.scan import check_finite, scan
from linker_core.speech import progress_of, say
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Scans one pair, checks one donor or compares several; exit status 1 after an error line."""
    parser = argparse.ArgumentParser(prog="linker_core.sharing.worker", allow_abbrev=False)
    parser.add_argument("--variant", type=Path, required=True)
    parser.add_argument("--donor", type=Path)
    parser.add_argument(
        "--near", type=Path, action="append", help="how close is it to this donor; may be repeated"
    )
    parser.add_argument("--no-scan", action="store_true", help="fingerprints only")
    parser.add_argument("--no-hash", action="store_true", help="no fingerprints")
    parser.add_argument("--device", default="cpu", help="where the sums are computed")
    arguments = parser.parse_args(argv)
    pace = Pace()
    pace.follow(sys.stdin)
    try:
        if arguments.near:
            result = compare(arguments.variant, arguments.near, pace=pace)
        else:
            result = examine(
                arguments.variant,
                arguments.donor,
                hashed=not arguments.no_hash,
                scanned=not arguments.no_scan,
                device=arguments.device,
                pace=pace,
            )
    except LinkerError as error:
        say({"error": error.to_record()})
        return 1
    say({"result": result})
    return 0


def examine(
    variant_path: Path,
    donor_path: Path | None,
    *,
    hashed: bool,
    scanned: bool,
    device: str,
    pace: Pace,
) -> dict[str, Any]:
    """Returns identities, fingerprints if `hashed` and, for a pair, the report, as JSON values.

    A device that is full or cannot be used leaves the scan to the CPU.

    The identities say which files were read, so that they can be matched with those of another run.
    A file that is cut short meanwhile ends this process.

    Raises:
        BadCheckpointError: See `scan` and `check_finite`.
        UnsupportedFormatError: See `Checkpoint.open`.
    """
    with ExitStack() as stack:
        variant = stack.enter_context(Checkpoint.open(variant_path))
        result: dict[str, Any] = {
            "fingerprint": None,
            "donor_fingerprint": None,
            "identity": variant.identity,
            "donor_identity": None,
            "report": None,
        }
        if hashed:
            result["fingerprint"] = fingerprint(
                variant, progress=progress_of("hashing"), pace=pace, mapped=True
            )
        if donor_path is None:
            if scanned:
                check_finite(variant, progress=progress_of("scanning"), pace=pace, mapped=True)
            return result
        donor = stack.enter_context(Checkpoint.open(donor_path))
        result["donor_identity"] = donor.identity
        if hashed:
            result["donor_fingerprint"] = fingerprint(
                donor, progress=progress_of("hashing"), pace=pace, mapped=True
            )
        if scanned:
            result["report"] = _scan(donor, variant, device=device, pace=pace).to_json()
        return result


def compare(variant_path: Path, donor_paths: Sequence[Path], *, pace: Pace) -> dict[str, Any]:
    """Returns how close a model is to each of several donors, as JSON values.

    A donor whose files can no longer be opened is skipped, with why; a file that is cut short
    meanwhile ends this process.

    Raises:
        BadCheckpointError: Of the variant; see also `measure_closeness`.
        UnsupportedFormatError: See `Checkpoint.open`.
    """
    with Checkpoint.open(variant_path) as variant:
        found = [_compare(path, variant, pace=pace) for path in donor_paths]
        return {"identity": variant.identity, "near": found}


def _compare(donor_path: Path, variant: Checkpoint, *, pace: Pace) -> dict[str, Any]:
    try:
        donor = Checkpoint.open(donor_path)
    except LinkerError as error:
        return {"identity": None, "error": error.message}
    with donor:
        found = measure_closeness(
            donor, variant, progress=progress_of("scanning"), pace=pace, mapped=True
        )
        return {"identity": donor.identity, **asdict(found)}


def _scan(donor: Checkpoint, variant: Checkpoint, *, device: str, pace: Pace) -> ScanReport:
    """Scans on the device, or on the CPU where that is full or cannot be used."""
    try:
        return scan(
            donor, variant, progress=progress_of("scanning"), pace=pace, mapped=True, device=device
        )
    except (AssertionError, RuntimeError) as error:  # the first: torch built without the device
        if device == "cpu":
            raise
        reason = str(error).partition("\n")[0]
        _log.warning("the device %s cannot scan: %s; the CPU does", device, reason)
    return _scan(donor, variant, device="cpu", pace=pace)


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main())
