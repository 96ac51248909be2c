"""Which scenarios a command measures."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from linker_core.errors import InvalidRequestError
from server.cli.bench.scenario import Settings, run_scenarios


def arguments(**given: Any) -> argparse.Namespace:
    neutral: dict[str, Any] = {
        "only": None, "rounds": 1, "tokens": 2, "dtype": None, "models": None, "peers": None,
        "alone": False, "results": None, "benchmark": "decode",
    }  # fmt: skip
    return argparse.Namespace(**neutral | given)


def measure(settings: Settings) -> dict[str, Any]:
    return {"peers": settings.peers is not None}


def test_run_scenarios_alone_leaves_out_what_only_compares() -> None:
    scenarios = {"single": measure, "fleet": measure}
    assert list(run_scenarios(scenarios, arguments())) == ["single", "fleet"]
    alone = run_scenarios(scenarios, arguments(alone=True))
    assert list(alone) == ["single"]
    assert alone["single"]["peers"] is False


def test_run_scenarios_of_an_unknown_name_says_which_is_near() -> None:
    with pytest.raises(InvalidRequestError, match="Did you mean single"):
        run_scenarios({"single": measure}, arguments(only=["singel"]))
