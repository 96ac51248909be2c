"""Where models are computed, and in what: the arguments alone, which need no torch."""

from __future__ import annotations

import argparse

_DTYPES = ("float32", "bfloat16")  # of torch


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where models are computed, and in what."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of weights and arithmetic (float32)"
    )
