"""What the gateway costs: the whole server but for the model, which a stand-in engine replaces.

The server runs on one core, the stand-in engine and the load on another. All requests are chats
whose prompt is rendered and tokenised, and whose answer repeats the prompt's tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from linker_core.errors import InvalidRequestError
from linker_core.machine_code import cache_directory
from server.cli.bench.gateway_load import at_once
from server.cli.bench.gateway_requests import streams
from server.cli.bench.gateway_scenarios import SCENARIOS, Plan, run_load
from server.cli.bench.gateway_servers import Cores, gateway
from server.cli.bench.scenario import chosen, machine
from server.cli.bench.synthetic import SERVED, Kinship, write_family

# Nothing of the weights is used; text is as with the others.
_SHAPE: Final = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": SERVED["vocab_size"],
}  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what a command line asks for.

    Raises:
        InvalidRequestError: A scenario of another name, or no round.
    """
    wanted = chosen(SCENARIOS, args.only)
    if args.rounds < 1 or args.scale <= 0:
        raise InvalidRequestError("--rounds takes at least 1, --scale a number above 0.")
    if args.scale < 1:
        print("this run is shortened: it proves nothing about the bars", file=sys.stderr)
    models = args.models or cache_directory() / "bench" / "gateway"
    plan = Plan(rounds=args.rounds, scale=args.scale, before=args.before)
    return {"machine": machine(), **measure(models, plan, wanted)}


def measure(models: Path, plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    """Runs scenarios; returns their figures, with what is asked of each beside it.

    Args:
        models: Where the made-up checkpoint is kept.
        plan: How much.
        names: Of the scenarios.
    """
    (model,) = write_family(models, kinship=Kinship.EQUAL, num_models=1, shape=_SHAPE)
    cores = Cores.of_this_machine()
    found: dict[str, Any] = {}
    with _on_core(cores.others), ExitStack() as stack:
        versions = [stack.enter_context(gateway(model, cores))]
        if plan.before is not None:
            versions.append(stack.enter_context(gateway(model, cores, root=plan.before)))
        for target in versions:  # once, so that everything is imported and compiled
            run_load(at_once(target.port, streams(8, max_tokens=16)))
        for name in names:
            print(f"measuring {name}", file=sys.stderr)
            found[name] = SCENARIOS[name](versions, plan, cores)
    return found


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """Keeps this process to a core meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
