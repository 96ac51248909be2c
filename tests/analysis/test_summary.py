"""A planted family's summary, and that it is always plain JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.components import gap_per_layer
from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.kernel.kernel import build_kernel
from analysis.record import TensorStudy
from analysis.selection import select
from analysis.study import study_tensor
from analysis.summary import summarise
from tests.analysis.planted import Planted, Structure, plant_family
from tests.analysis.test_study import gram_of, studied


def summary_of(planted: Planted) -> dict[str, object]:
    """Through JSON, as it crosses the worker's pipe."""
    studies = [
        TensorStudy.from_json(json.loads(json.dumps(study.to_json())))
        for study in studied(planted, num_draws=59)
    ]
    summary = summarise(studies, base="base", names=planted.names, seed=0, num_draws=59)
    restored: dict[str, object] = json.loads(json.dumps(summary, allow_nan=False))
    return restored


def at(summary: object, *keys: str) -> object:
    """Returns what lies under a chain of keys."""
    for key in keys:
        assert isinstance(summary, dict)
        summary = summary[key]
    return summary


def test_summary_of_a_planted_family_has_its_numbers(small_family: Planted) -> None:
    summary = summary_of(small_family)

    # Equal norms, pairwise cosine 1/2.
    assert at(summary, "components", "all", "pc1") == pytest.approx(0.6, abs=1e-3)
    assert at(summary, "components", "attention", "pc1_centred") == pytest.approx(0.25, abs=1e-3)
    assert at(summary, "components", "all", "num_tensors") == summary["num_tensors"] == 14
    assert at(summary, "components", "all", "significant_share_centred") == 0.0
    assert at(summary, "pairwise_cosine", "mean") == pytest.approx(0.5, abs=1e-3)
    assert np.array(at(summary, "pairwise_cosine", "matrix")) == pytest.approx(
        0.5 + 0.5 * np.eye(5), abs=1e-3
    )
    assert at(summary, "variants", "two", "epsilon") == pytest.approx(0.05, rel=1e-3)
    assert at(summary, "kernel", "snr") == pytest.approx(np.sqrt(0.6 / 0.4), rel=1e-2)
    assert summary["gap_per_layer"] == pytest.approx([0.0, 0.0], abs=1e-3)
    assert summary["shared_fraction"] is None
    assert at(summary, "method", "dtypes") == ["F32"]


def test_summary_has_the_weights_and_the_norm_of_the_kernel(small_family: Planted) -> None:
    with small_family.open() as family:
        grams = list(gram_pass(family, select(family.base)))
        kernel = build_kernel(grams, names=family.names, seed=0)

    summary = summary_of(small_family)

    assert at(summary, "kernel", "norm") == pytest.approx(kernel.norm)
    assert at(summary, "kernel", "weights_per_layer") == pytest.approx(
        list(kernel.weights_per_layer().values())
    )


def test_summary_of_some_layers_keeps_their_numbers(small_family: Planted) -> None:
    whole = studied(small_family, num_draws=19)
    last = [study for study in whole if study.layer == 1]

    of_last = summarise(last, base="base", names=small_family.names, seed=0)

    weights, gaps = of_last["kernel"]["weights_per_layer"], of_last["gap_per_layer"]
    assert (len(weights), len(gaps)) == (2, 2)
    assert weights[0] is gaps[0] is None
    assert weights[1] == pytest.approx(of_last["kernel"]["weight"])
    assert gaps[1] == gap_per_layer(whole, field="pc1_centred")[1]


def test_summary_labels_core_and_periphery(tmp_path: Path) -> None:
    scales = {"one": 0.3, "two": 0.1}
    planted = plant_family(tmp_path, Structure(shared=0.2, scale=0.02, scales=scales), layers=1)

    summary = summary_of(planted)

    roles = {name: at(summary, "variants", name, "role") for name in planted.names}
    assert roles == {"one": "periphery", **dict.fromkeys(planted.names[1:], "core")}
    assert at(summary, "variants", "one", "jackknife_cosine_min") < 0.3  # type: ignore[operator]
    kinds = [entry["kind"] for entry in at(summary, "variants", "one", "diagnostics")]  # type: ignore[attr-defined]
    assert "single_source" in kinds


@pytest.mark.parametrize("num_variants", [1, 2, 3])
def test_summary_of_few_has_no_pc1_below_three_and_no_jackknife_below_four(
    num_variants: int, tmp_path: Path
) -> None:
    structure = Structure(num_variants=num_variants, shared=0.65)

    summary = summary_of(plant_family(tmp_path, structure, layers=1))

    assert (at(summary, "components", "all", "pc1_centred") is None) == (num_variants < 3)
    assert (at(summary, "components", "all", "null95_centred") is None) == (num_variants < 3)
    assert at(summary, "variants", "one", "jackknife_cosine") is None
    assert at(summary, "variants", "one", "role") is None
    assert (summary["kernel"] is None) == (num_variants == 1)
    if num_variants == 2:
        assert at(summary, "shared_fraction", "mean") == pytest.approx(0.65**2, abs=1e-3)
        assert at(summary, "shared_fraction", "components", "q") == pytest.approx(0.4225, abs=1e-3)
    else:
        assert summary["shared_fraction"] is None


@pytest.mark.parametrize("num_variants", [1, 2, 3, 4])
def test_summary_of_copies_of_the_base_is_plain_json(num_variants: int, tmp_path: Path) -> None:
    structure = Structure(num_variants=num_variants, scale=0.0)

    summary = summary_of(plant_family(tmp_path, structure, layers=1))

    assert at(summary, "components", "all", "pc1_centred") is None
    assert at(summary, "variants", "one", "delta_norm") == 0.0
    kinds = {entry["kind"] for entry in summary["diagnostics"]}  # type: ignore[attr-defined]
    assert kinds == {"degenerate", "near_unity"}


def test_summary_of_equal_fine_tunes_is_plain_json(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=4, shared=1.0), layers=1)

    summary = summary_of(planted)

    assert at(summary, "pairwise_cosine", "mean") == pytest.approx(1.0, abs=1e-3)
    assert at(summary, "components", "all", "pc1") == pytest.approx(1.0, abs=1e-3)


def test_summary_imports_nothing_heavy() -> None:
    program = (
        "import sys, analysis.summary, analysis.study\n"
        "assert not {'torch', 'transformers', 'scipy', 'plotly', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("seed", range(15))
def test_summary_of_any_deltas_is_plain_json(seed: int) -> None:
    """One to nine fine-tunes, few elements, sizes apart, zeros, copies: never NaN, no warning."""
    rng = np.random.default_rng(seed)
    num_models, num_runs = int(rng.integers(1, 10)), int(rng.choice([1, 2, 8]))
    names = tuple(f"m{number}" for number in range(num_models))
    studies = []
    for tensor in (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "lm_head.weight",
    ):
        deltas_ND = rng.standard_normal((num_models, num_runs * int(rng.choice([1, 16]))))
        deltas_ND *= 10.0 ** rng.uniform(-12, 3, (num_models, 1))
        deltas_ND[rng.integers(num_models)] *= rng.integers(2)
        if rng.random() < 0.3:
            deltas_ND[:] = deltas_ND[0]
        base_D = float(rng.random() < 0.9) * rng.standard_normal((deltas_ND.shape[1],))
        gram = gram_of(
            deltas_ND,
            base_D,
            name=tensor,
            runs=num_runs,
        )
        studies.append(study_tensor(gram, names=names, seed=seed, num_draws=19))

    summary = summarise(studies, base="base", names=names, seed=seed)

    json.dumps(summary, allow_nan=False)
    for study in studies:
        assert TensorStudy.from_json(json.loads(json.dumps(study.to_json()))) == study
        for field in ("pc1", "pc1_centred", "pc1_normalised", "pc1_normalised_centred"):
            share = getattr(study, field)
            assert share is None or 0.0 < share <= 1.0 + 1e-9


@pytest.mark.shared
def test_summary_of_the_mini_family_says_how_it_was_made(shared: Path) -> None:
    """Two sets of dialogues, one of sums, and continued pre-training that is PC1 all by itself."""
    folder = shared / "families" / "mini-qwen2"
    names = ("instruct", "chat", "math", "code")
    with StudiedFamily.open(folder / "base", {name: folder / name for name in names}) as family:
        studies = [
            study_tensor(gram, names=names, seed=0, num_draws=199)
            for gram in gram_pass(family, select(family.base))
        ]

    summary = summarise(studies, base="base", names=names, seed=0, num_draws=199)

    kinds = {(entry["model"], entry["kind"]) for entry in summary["diagnostics"]}
    assert kinds == {
        ("instruct", "monoculture"),
        ("chat", "monoculture"),
        ("chat", "near_unity"),
        ("code", "continued_pretraining"),
        ("code", "single_source"),
    }
    assert {name: row["role"] for name, row in summary["variants"].items()} == {
        "instruct": "core",
        "chat": "core",
        "math": "core",
        "code": "periphery",
    }
    everything = summary["components"]["all"]
    assert everything["pc1"] - everything["null95"] < 0.005  # size alone
    assert everything["pc1_normalised"] - everything["null95_normalised"] > 0.15
