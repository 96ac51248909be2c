"""Where a probe's models are computed, and that they compute numbers.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
from typing import Final

import torch

from analysis.model import StudyModel, usable_device
from linker_core.errors import InvalidRequestError
from linker_core.sharing.scan import check_finite
from linker_core.weights.checkpoint import Checkpoint

CPU = "cpu"
_TRIAL_TOKENS: Final = 8


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Declares `--device`."""
    parser.add_argument(
        "--device",
        default=CPU,
        help=f"where models are computed: {CPU}, cuda, cuda:1, … (default {CPU})",
    )


def open_model(checkpoint: Checkpoint, device: str) -> StudyModel:
    """Reads a checkpoint's weights into a float32 model on a device.

    Raises:
        InvalidRequestError: There is no such device, or the model's outputs are no numbers.
        BadCheckpointError: NaN or infinite weights.
        LinkerError: See `StudyModel.open`.
    """
    found = usable_device(device)
    check_finite(checkpoint)
    model = StudyModel.open(checkpoint, device=found)
    ids_1T = torch.arange(min(_TRIAL_TOKENS, model.config.vocab_size))[None]
    with torch.no_grad():
        logits_TV = model.logits(model.hidden(ids_1T)[0])
    if not logits_TV.isfinite().all():
        raise InvalidRequestError(
            f"{checkpoint.path}: the model's outputs are no numbers, though its weights are: there "
            "is nothing to measure. Leave it out."
        )
    return model
