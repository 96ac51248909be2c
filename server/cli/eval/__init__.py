"""`linker eval MODEL`: what benchmarks say of a served model, and what sharing costs it."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from linker_core.errors import InvalidRequestError
from server.cli.eval.report import RETENTION_TASKS, retention, retention_table, score_table
from server.cli.eval.runs import Evaluation, check_harness, evaluate
from server.cli.eval.serving import Evaluated, Server
from server.cli.remote import add_server_arguments, key_of
from server.gateway.schemas.generation import VariantMode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("model", help="a model of the server, or an alias")
    parser.add_argument("--tasks", type=_names, help="comma-separated, as lm-eval calls them")
    parser.add_argument(
        "--retention",
        action="store_true",
        help=f"what sharing retains: by default {', '.join(RETENTION_TASKS)}, with both weights",
    )
    parser.add_argument(
        "--variant-mode",
        choices=get_args(VariantMode),
        help="whose weights answer: as planned (the default), or those onboarded",
    )
    add_server_arguments(parser, role="an operator")
    parser.add_argument("--data", type=Path, help="folder of local task data, asks no hub")
    parser.add_argument("--limit", type=_count, help="samples of each task")
    parser.add_argument("--num-fewshot", type=int, help="examples in each prompt")
    parser.add_argument("--concurrency", type=_count, default=4, help="requests at once")
    parser.add_argument("--batch", type=_count, default=4, help="prompts in a request")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="interpreter that has lm-eval"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluates, stores the scores beside the plan and prints them.

    Raises:
        LinkerError: The server or lm-eval is not there, or one of them gave up.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    asked = _evaluation(args)
    check_harness(asked.python)
    key = key_of(args)
    modes: Sequence[VariantMode] = (args.variant_mode or "planned",)
    if args.retention:
        modes = ("unshared", "planned")
    with Server(args.url, key) as server:
        model = server.find(args.model)
        found: dict[VariantMode, dict[str, Any]] = {}
        for mode in modes:
            found[mode] = _scores(model, mode, asked, found, key=key)
            server.store(model, mode, found[mode])
    _show(args, model, asked, found)
    return 0


def _scores(
    model: Evaluated,
    mode: VariantMode,
    asked: Evaluation,
    known: dict[VariantMode, dict[str, Any]],
    *,
    key: str | None,
) -> dict[str, Any]:
    """Returns what lm-eval finds; the second answers of the same weights need not be asked for."""
    if known and model.serves_own_weights:
        return next(iter(known.values()))
    return evaluate(model, mode, asked, key=key)


def _show(
    args: argparse.Namespace,
    model: Evaluated,
    asked: Evaluation,
    found: dict[VariantMode, dict[str, Any]],
) -> None:
    if not args.retention:
        [(mode, said)] = found.items()
        if args.json:
            print(json.dumps({"model": model.name, "variant_mode": mode, **said}, indent=2))
            return
        name = f"{model.name}, {mode} weights, {said['harness']}"
        print(score_table(name, said["tasks"], asked.tasks, limit=asked.limit))
        return
    cells = retention(found["unshared"]["tasks"], found["planned"]["tasks"], asked.tasks)
    if args.json:
        rows = [cell.to_json() for cell in cells]
        print(json.dumps({"model": model.name, "policy": model.policy, "cells": rows}, indent=2))
        return
    print(retention_table(f"{model.name}, policy {model.policy}", cells, limit=asked.limit))


def _evaluation(args: argparse.Namespace) -> Evaluation:
    if args.tasks is None and not args.retention:
        raise InvalidRequestError("Say --tasks, or --retention for those of BS appendix D.")
    if args.retention and args.variant_mode is not None:
        raise InvalidRequestError("--retention asks both weights; leave --variant-mode out.")
    return Evaluation(
        tasks=args.tasks or tuple(RETENTION_TASKS),
        data=args.data,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        concurrency=args.concurrency,
        batch=args.batch,
        python=args.python,
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("name at least one task")
    return names


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("one at least")
    return count
