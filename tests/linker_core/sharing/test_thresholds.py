from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import InvalidRequestError
from linker_core.sharing import thresholds
from linker_core.sharing.report import BlockScan, ScanReport
from linker_core.sharing.similarity import PairSums
from linker_core.sharing.thresholds import Thresholds, choose_thresholds, load_tiers, suggest_tier
from linker_core.weights.architecture import parse_config


def block(epsilon: float, cos: float = 1.0) -> BlockScan:
    """A block of one sub-parameter of norm 1 with this cos and ε."""
    sums = PairSums(
        dot=cos,
        donor_square=1.0,
        variant_square=1.0,
        delta_square=epsilon**2,
        identical=False,
        count=1,
    )
    return BlockScan(index=0, params={"mlp.up_proj.weight": sums})


def report(epsilon: float) -> ScanReport:
    return ScanReport(
        donor="d",
        variant="v",
        bytes_read=0,
        scan_seconds=0.0,
        blocks=(block(epsilon),),
        outside_blocks={},
        identical_rows={},
    )


@pytest.mark.parametrize(
    ("cos", "epsilon", "shared"),
    [(0.99, 0.05, True), (0.9899, 0.05, False), (0.99, 0.0501, False), (1.0, 0.0, True)],
)
def test_shares_needs_both_criteria_bounds_included(
    cos: float, epsilon: float, shared: bool
) -> None:
    chosen = Thresholds(tau_cos=0.99, tau_frob=0.05, source="explicit")
    assert chosen.shares(block(epsilon, cos)) is shared


def test_choose_with_nothing_said_is_conservative() -> None:
    chosen = choose_thresholds(report(0.03))
    assert (chosen.tau_cos, chosen.tau_frob, chosen.source) == (0.999, 0.05, "conservative")


def test_choose_explicit_beats_the_boundary_rule() -> None:
    chosen = choose_thresholds(report(0.3), tau_cos=0.9, tau_frob=0.4)
    assert (chosen.tau_cos, chosen.tau_frob, chosen.source) == (0.9, 0.4, "explicit")


def test_choose_named_tier_applies_to_a_boundary_family() -> None:
    chosen = choose_thresholds(report(0.156), tier="Llama-3.2-1B")
    assert (chosen.tau_cos, chosen.tau_frob, chosen.source) == (0.99, 0.20, "tier Llama-3.2-1B")


@pytest.mark.parametrize(("epsilon", "source"), [(0.10, "tier Qwen2.5-0.5B"), (0.1001, "boundary")])
def test_choose_boundary_rule_beats_a_recognised_donor(
    monkeypatch: pytest.MonkeyPatch, epsilon: float, source: str
) -> None:
    tiers = load_tiers()
    tiers["Qwen2.5-0.5B"] = replace(tiers["Qwen2.5-0.5B"], fingerprints=frozenset({"known"}))
    monkeypatch.setattr(thresholds, "load_tiers", lambda: tiers)
    assert choose_thresholds(report(epsilon), donor_fingerprint="known").source == source


def test_choose_unknown_donor_gets_no_tier() -> None:
    assert choose_thresholds(report(0.01), donor_fingerprint="ff").source == "conservative"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tau_cos": 0.9}, "tau_frob"),
        ({"tau_frob": 0.9}, "tau_cos"),
        ({"tau_cos": 0.9, "tau_frob": 0.1, "tier": "Qwen2.5-3B"}, "tier"),
        ({"tier": "qwen"}, "tier"),
        ({"tau_cos": 1.1, "tau_frob": 0.1}, "tau_cos"),
        ({"tau_cos": float("nan"), "tau_frob": 0.1}, "tau_cos"),
        ({"tau_cos": 0.9, "tau_frob": -0.1}, "tau_frob"),
        ({"tau_cos": 0.9, "tau_frob": float("inf")}, "tau_frob"),
    ],
)
def test_choose_contradiction_names_the_parameter(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        choose_thresholds(report(0.01), **given)
    assert caught.value.param == param


def test_tiers_are_the_rows_of_bs_table_8() -> None:
    assert {name: tier.tau_frob for name, tier in load_tiers().items()} == {
        "Mistral-7B-v0.3": 0.05,
        "Qwen2.5-3B": 0.05,
        "Qwen2.5-7B": 0.05,
        "Qwen2.5-0.5B": 0.06,
        "Llama-3.1-8B": 0.05,
        "Gemma-2-2B": 0.07,
        "Llama-3.2-3B": 0.13,
        "Llama-3.2-1B": 0.20,
    }


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(load_tiers()))
def test_suggest_tier_knows_each_family_by_shape(shared: Path, name: str) -> None:
    record = json.loads((shared / "architectures" / f"{name}.json").read_text())
    assert suggest_tier(parse_config(record)) == name
