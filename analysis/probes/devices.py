"""Where a probe's models are computed."""

from __future__ import annotations

import argparse

from analysis.model import StudyModel, usable_device
from linker_core.sharing.scan import check_finite
from linker_core.weights.checkpoint import Checkpoint

CPU = "cpu"


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Declares `--device`."""
    parser.add_argument("--device", default=CPU, help=f"{CPU}, cuda, cuda:1, … ({CPU})")


def open_model(checkpoint: Checkpoint, device: str) -> StudyModel:
    """Reads a checkpoint's weights into a float32 model on a device.

    Raises:
        InvalidRequestError: There is no such device.
        BadCheckpointError: NaN or infinite weights.
        LinkerError: See `StudyModel.open`.
    """
    found = usable_device(device)
    check_finite(checkpoint)
    return StudyModel.open(checkpoint, device=found)
