"""What a study of a family's fine-tunes says, as far as metrics and the page read it."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from server.registry.records import StudyRecord

COMPONENTS = ("q", "k", "v", "o", "gate", "up", "down", "attention", "mlp", "all")
LAYERS = 4
FEWEST = 3  # fine-tunes that have principal components


def study_of(base: str, *variants: str, summary: dict[str, Any] | None = None) -> StudyRecord:
    """Returns a study that ended at time 20."""
    return StudyRecord(
        key=base,
        family=base,
        base={"name": base, "fingerprint": "b"},
        variants=dict.fromkeys(variants, "v"),
        created_at=10.0,
        num_tensors=7 * LAYERS,
        summary=summary or summary_of(base, *variants),
        finished_at=20.0,
    )


def summary_of(base: str, *variants: str, **more: Any) -> dict[str, Any]:
    """Returns a summary in which every number can be told from every other.

    Args:
        base: The base's name.
        variants: The fine-tunes' names; the first and the last have a finding.
        more: What it says otherwise.
    """
    has_pc1 = len(variants) >= FEWEST
    findings = [
        {"kind": "near_unity", "model": variants[0], "reason": "Its cosine is 0.9999."},
        {"kind": "monoculture", "model": variants[-1], "reason": "Its mean cosine is 0.9."},
    ] if variants else []  # fmt: skip
    return {
        "base": base,
        "variants": {
            name: _variant(place, has_pc1, [one for one in findings if one["model"] == name])
            for place, name in enumerate(variants)
        },
        "components": {name: _component(place, has_pc1) for place, name in enumerate(COMPONENTS)},
        "gap_per_layer": [0.05 - 0.02 * layer for layer in range(LAYERS)] if has_pc1 else [],
        "pairwise_cosine": _cosines(variants),
        "kernel": {
            "acceptance_ratio": 0.44, "temperature": 1.0, "num_steps": 5000, "burn_in": 1000,
            "weights_per_layer": [0.5 + 0.01 * layer for layer in range(LAYERS)],
            "weight": 0.515, "snr": 0.9, "norm": 3.5,
        },
        "shared_fraction": None if has_pc1 else {
            "mean": 0.61, "std": 0.1, "null95": 0.04,
            "components": dict.fromkeys(COMPONENTS[:7], 0.6),
        },
        "diagnostics": findings,
        "num_tensors": 7 * LAYERS,
        "method": {
            "seed": 0, "num_draws": 1000, "null": "n", "interval": "i", "significance": "s",
            "dtypes": ["F32"],
        },
        **more,
    }  # fmt: skip


def _cosines(names: tuple[str, ...]) -> dict[str, Any]:
    places = range(len(names))
    matrix = [[round(0.5 ** abs(i - j), 4) for j in places] for i in places]
    pairs = [matrix[i][j] for i, j in combinations(places, 2)]
    return {
        "mean": sum(pairs) / len(pairs) if pairs else None,
        "matrix": matrix,
        "null95": [[0.05 for _ in places] for _ in places],
        "names": list(names),
    }


def _variant(place: int, has_pc1: bool, findings: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "delta_norm": 1.5 + place,
        "delta_norm_max": 4.0 + place,
        "delta_norm_min": 0.5 + place,
        "epsilon": 0.01 * (1 + place),
        "cos": 0.9999,
        "loading": 0.2 + 0.1 * place if has_pc1 else None,
        "loading_uncentred": 0.3 + 0.1 * place if has_pc1 else None,
        "jackknife_cosine": 0.99 - 0.05 * place if has_pc1 else None,
        "jackknife_cosine_min": 0.8 - 0.05 * place if has_pc1 else None,
        "jackknife_cosine_uncentred": 0.98 - 0.05 * place if has_pc1 else None,
        "pc1_shift": 0.02 * place - 0.01 if has_pc1 else None,
        "role": ("core", "periphery")[place % 2] if has_pc1 else None,
        "diagnostics": [{"kind": one["kind"], "reason": one["reason"]} for one in findings],
    }


def _component(place: int, has_pc1: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "num_tensors": LAYERS, "cos_mean": 0.2 + 0.01 * place, "snr": 0.7 + 0.1 * place,
    }  # fmt: skip
    for number, kind in enumerate(("", "_centred", "_normalised", "_normalised_centred")):
        row[f"pc1{kind}"] = 0.51 + 0.02 * place - 0.01 * number if has_pc1 else None
        row[f"null95{kind}"] = 0.36 + 0.01 * place - 0.01 * number if has_pc1 else None
        share = row[f"pc1{kind}"]
        row[f"interval{kind}"] = [share - 0.02, share + 0.02] if has_pc1 else None
        row[f"majority_share{kind}"] = 0.75 if has_pc1 else None
        row[f"significant_share{kind}"] = 0.5 if has_pc1 else None
    return row
