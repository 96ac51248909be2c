"""`linker analyze STUDY BASE VARIANT …`: what fine-tuning did to a family's weights.

Each study is a module of this package with `EXAMPLE`, `add_arguments(parser)` and `run(args)`. Only
the one that is asked for is imported: some bring torch along, or plotly.
"""

from __future__ import annotations

import argparse
import importlib
import os
import textwrap
from functools import partial
from typing import Any

from server.cli.analyze.deferred import DeferredParser

STUDIES = {
    "pca": "principal components of the fine-tunes' deltas, each with its null (FM 3.3)",
    "stability": "what each fine-tune contributes: the study without it (FM 4.6)",
    "diagnose": "degenerate, outlying and alike fine-tunes, with reasons (FM 4.4)",
    "kernel": "the delta that fine-tunes agree on: weigh, compare, export it (FM 3.4)",
    "transfer": "the kernel of one family applied to another (FM 3.5)",
    "warm-start": "fine-tuning from base, base + kernel and base + noise (FM 5.5)",
    "eval": "perplexity, instructions and multiple choice along the kernel (FM 3.6)",
    "probe": "one experiment of the block sharing paper",
    "report": "tables and figures of all of it in one HTML file",
}

# Thousands of products of matrices as small as families are: more threads of OpenBLAS would but
# wait for each other. The others have matrices as large as a model's, or leave the work to torch.
_SMALL_MATRICES = ("pca", "stability", "diagnose", "report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the studies; what they take is declared by the one that is asked for."""
    studies = parser.add_subparsers(
        dest="study", required=True, metavar="STUDY", parser_class=DeferredParser
    )
    for name, text in STUDIES.items():
        studies.add_parser(
            name, declare=partial(_declare, name), help=text, description=text, allow_abbrev=False
        )


def run(args: argparse.Namespace) -> int:
    """Studies and prints; stdout holds one JSON document under --json."""
    status: int = _module(args.study).run(args)
    return status


def _declare(study: str, parser: argparse.ArgumentParser) -> None:
    module = _module(study)
    module.add_arguments(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the example's lines
    parser.epilog = f"example:\n{textwrap.indent(module.EXAMPLE, '  ')}"


def _module(study: str) -> Any:
    if study in _SMALL_MATRICES:  # numpy reads it when it is imported, which is done by the study
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return importlib.import_module(f"{__name__}.{study.replace('-', '_')}")
