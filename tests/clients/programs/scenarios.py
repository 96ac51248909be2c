"""How a client's program runs: every scenario by itself, and what all of them found as JSON.

Programs run in environments of their own, with nothing of this project but this folder.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TypedDict


class Servers(TypedDict):
    """Where the servers are, and how to talk to them."""

    answering: str  # the real engine: tiny random models
    echoing: str  # an engine that answers with the last message; prompts of ids may ask for faults
    spare: str  # a directory that the echoing server may onboard
    guarded: str  # like it, for those who have keys
    keys: dict[str, str]  # the guarded server's: "client", and "slow" for one request a minute
    faults: dict[str, int]  # the first token of a prompt that asks the echoing server for one


DONOR, VARIANT = "acme/base", "acme/near"
Scenario = Callable[[Servers], object]


def run(scenarios: Mapping[str, Scenario]) -> None:
    """Runs the scenarios in order and writes one line of JSON after all that clients have said."""
    servers: Servers = json.loads(sys.argv[1])
    found: dict[str, dict[str, object]] = {}
    for name, scenario in scenarios.items():
        try:
            found[name] = {"found": scenario(servers)}
        except Exception:  # noqa: BLE001 - told to the test of this scenario
            found[name] = {"failed": traceback.format_exc()}
    sys.stdout.write("\n" + json.dumps(found) + "\n")
