"""What decode and serve have in common: their settings, their results, how figures are put."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from linker_core.errors import InvalidRequestError
from linker_core.machine_code import cache_directory
from server.cli.bench.figures import Round, against_best, summary
from server.cli.bench.peers import DTYPES, default_peers
from server.cli.bench.process_tree import TreeMemory
from server.cli.bench.synthetic import SERVED, Kinship, write_family

OURS: Final = "linker"
FLEET: Final = "fleet"  # a comparison with several peers, nothing without them
ROUNDED: Final = "linker medium"  # ours with matmul_precision: medium
PROMPT_TOKENS: Final = 32
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every scenario is told.

    Attributes:
        models: A directory for made-up checkpoints.
        peers: The peers' environments; None measures our own engine alone.
        rounds: How often each work is done.
        tokens: Of each answer.
        dtypes: In which the peers run.
        shape: Of the checkpoints, with the vocabulary that prompts are drawn from.
    """

    models: Path
    peers: Path | None
    rounds: int
    tokens: int
    dtypes: Sequence[str] = DTYPES
    shape: Mapping[str, Any] = field(default_factory=lambda: SERVED)

    def family(self, kinship: Kinship, num_models: int) -> list[Path]:
        """Returns the directories of a base and its variants."""
        return write_family(self.models, kinship=kinship, num_models=num_models, shape=self.shape)


Scenario = Callable[[Settings], dict[str, Any]]


def run_scenarios(scenarios: Mapping[str, Scenario], args: argparse.Namespace) -> dict[str, Any]:
    """Measures the scenarios asked for; returns the machine and what each found.

    Each is added to the results as soon as it is measured, since all of them take an hour.

    Raises:
        InvalidRequestError: A scenario of another name, no round, or fewer than two tokens.
    """
    all_names = [name for name in scenarios if not (args.alone and name == FLEET)]
    wanted = chosen(scenarios, args.only) if args.only else all_names
    if args.rounds < 1 or args.tokens < 2:
        raise InvalidRequestError("--rounds takes at least 1, --tokens at least 2.")
    settings = Settings(
        models=args.models or cache_directory() / "bench",
        peers=None if args.alone else args.peers or default_peers(),
        rounds=args.rounds,
        tokens=args.tokens,
        dtypes=args.dtype or DTYPES,
    )
    results: dict[str, Any] = {}
    with _interruptible():
        for name in wanted:
            # With each, since a machine is not equally busy all along.
            found = {"machine": machine(), "rounds": args.rounds, "tokens": args.tokens}
            results[name] = found | scenarios[name](settings)
            if args.results is not None:
                _add_result(args.results, f"{args.benchmark} {name}", results[name])
    return results


def chosen(scenarios: Collection[str], wanted: Sequence[str] | None) -> list[str]:
    """Returns the scenarios that were named, or all.

    Raises:
        InvalidRequestError: There is none of a name.
    """
    for name in wanted or ():
        if name not in scenarios:
            near = difflib.get_close_matches(name, scenarios, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(scenarios)}."
            raise InvalidRequestError(f"--only: {name!r} is no scenario. {hint}")
    return list(wanted or scenarios)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets both signals end what was started on the way out, halted processes above all.

    A shell's background job would ignore SIGINT, and SIGTERM would leave no time.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def machine() -> dict[str, Any]:
    """Returns what the figures depend on."""
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpu)}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", ""),
        "cores": len(os.sched_getaffinity(0)),
        "bfloat16_units": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "load_average": os.getloadavg()[0],
    }


def compared(rounds: Mapping[str, Sequence[Round]]) -> dict[str, Any]:
    """Returns figures of each contender, and ours beside the others'."""
    others = {name: found for name, found in rounds.items() if name not in (OURS, ROUNDED)}
    found = {
        "figures": {name: summary(found) for name, found in rounds.items()},
        **against_best(rounds[OURS], others),
    }
    if ROUNDED in rounds:
        found["rounded"] = against_best(rounds[ROUNDED], others)
    return found


def memory_figures(memory: TreeMemory) -> dict[str, float]:
    """Returns both figures in MiB."""
    return {
        "pss_mib": memory.pss_bytes / _MIB,
        "anonymous_mib": memory.anonymous_bytes / _MIB,
    }


def tell(number: int, work: str, name: str, found: Round) -> None:
    """Says on stderr what a round gave."""
    print(
        f"round {number + 1}, {work}, {name}: {found.tokens_per_s:.1f} tok/s, "
        f"first token after {max(found.first_token_s, default=0) * 1e3:.0f} ms",
        file=sys.stderr,
    )


def _add_result(path: Path, name: str, found: Mapping[str, Any]) -> None:
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(results | {name: found}, indent=1) + "\n")
