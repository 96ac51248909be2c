from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analysis.family import StudiedFamily
from analysis.model import StudyModel
from analysis.probes import amplification
from analysis.probes.sequences import Excerpt
from tests.analysis.probes.columns import fact, records
from tests.tiny import make_checkpoint, make_variant, save_state

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
ADDS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _silenced(folder: Path, layers: tuple[int, ...]) -> None:
    """Blocks that add nothing to what they read."""
    state = load_file(folder / "model.safetensors")
    for layer in layers:
        for name in ADDS:
            state[f"model.layers.{layer}.{name}"].zero_()
    save_state(folder, state)


def test_an_error_passes_silent_layers_unchanged(tmp_path: Path, text: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32", layers=3)
    tuned = make_variant(tmp_path / "tuned", base, scale={})
    state = load_file(tuned / "model.safetensors")
    for name in ADDS:
        state[f"model.layers.0.{name}"] *= 1.5
    save_state(tuned, state)
    _silenced(base, (1, 2))
    _silenced(tuned, (1, 2))
    with StudiedFamily.open(base, {"tuned": tuned}) as family:
        result = amplification.measure(family, Excerpt(path=text, num_sequences=2, num_tokens=12))
    first, second, third = records(result)
    assert first["alpha"] is None  # embeddings are the variant's: there is no error before it
    assert isinstance(first["error"], float)
    assert first["error"] > 0.05
    for row in (second, third):
        assert row["error"] == pytest.approx(first["error"], rel=1e-5)
        for column in ("alpha", "alpha_median", "alpha_p5", "alpha_p95"):
            assert row[column] == pytest.approx(1.0, rel=1e-4)


def test_errors_are_those_of_two_whole_models(family: StudiedFamily) -> None:
    ids_ST = torch.arange(24).view(2, 12) * 5 % 300
    variant, base = family.variants["far"], family.base
    model = StudyModel.open(variant)
    errors = amplification.relative_errors(model, base, ids_ST, aliased=(0, 2))
    own = _hidden_behind_layers(StudyModel.open(variant), ids_ST)
    mixed = StudyModel.open(variant)
    mixed.adopt(
        base,
        [name for name in mixed.names if ".layers.0." in name or ".layers.2." in name],
    )
    shared = _hidden_behind_layers(mixed, ids_ST)
    assert not errors[0].any()
    for found, a, b in zip(errors[1:], own, shared, strict=True):
        expected = ((b - a).norm(dim=-1) / a.norm(dim=-1)).flatten()
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3)
    # The model that was walked is the variant again.
    for name in model.names:
        assert torch.equal(model.get(name), StudyModel.open(variant).get(name))


def _hidden_behind_layers(model: StudyModel, ids_ST: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    layers = model.module.get_submodule("model.layers")
    for layer in layers.children():
        layer.register_forward_hook(lambda _module, _args, out: found.append(out))
    with torch.no_grad():
        model.hidden(ids_ST)
    return found


def test_growth_over_tokens_is_the_mean_of_ratios() -> None:
    errors = [np.array([0.0, 0.0]), np.array([0.1, 0.2]), np.array([0.2, 0.2])]
    first, second = amplification._growth(errors)
    assert first == pytest.approx((0, 0.15, None, None, None, None))
    # Ratios 2 and 1: mean and median 1.5, percentiles between them.
    assert second == pytest.approx((1, 0.2, 1.5, 1.5, 1.05, 1.95))


def test_layers_before_the_first_aliased_one_have_no_error(
    family: StudiedFamily, text: Path
) -> None:
    result = amplification.measure(
        family, Excerpt(path=text, num_sequences=2, num_tokens=12), blocks="1"
    )
    rows = [row for row in records(result) if row["variant"] == "far"]
    assert [row["error"] == 0.0 for row in rows] == [True, False, False]
    assert [row["alpha"] is None for row in rows] == [True, True, False]
    assert fact(result, "far: error at the end") == rows[-1]["error"]


@pytest.mark.shared
def test_errors_of_a_trained_family_grow_within_the_papers_band(
    mini: StudiedFamily, shared: Path
) -> None:
    text = shared / "data" / "wikitext2" / "valid.txt"
    result = amplification.measure(mini, Excerpt(path=text, num_sequences=2, num_tokens=48))
    growth = [row["alpha"] for row in records(result) if row["layer"] != 0]
    assert len(growth) == 4 * 7
    assert all(isinstance(alpha, float) and 0.7 < alpha < 2.2 for alpha in growth)
    ends = [fact(result, f"{name}: error at the end") for name in ("chat", "math", "code")]
    assert ends == sorted(ends)
