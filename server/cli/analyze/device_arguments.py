"""Where models are computed, and in what: the arguments alone, which need no torch."""

from __future__ import annotations

import argparse

_DTYPES = ("float32", "bfloat16")  # of torch


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where models are computed, and in what."""
    parser.add_argument(
        "--device",
        default="cpu",
        help="where models are computed: cpu, cuda, cuda:1, … (default cpu)",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="of the weights in memory and of arithmetic (default float32)",
    )
