from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from analysis.family import StudiedFamily
from analysis.model import StudyModel
from analysis.probes import gradient_locality
from analysis.probes.correlation import pearson, pearson_interval, spearman
from linker_core.errors import InvalidRequestError
from tests.analysis.probes.columns import fact, records
from tests.tiny import make_checkpoint, make_variant


def test_correlations_of_known_points() -> None:
    # Deviations -1, 0, 1 and -1, -1, 2: covariance 3, squares 2 and 6.
    found = pearson([1, 2, 3], [1, 1, 4])
    assert found is not None
    assert found.r == pytest.approx(3 / math.sqrt(12))
    ranks = spearman([1, 2, 3, 4], [10, 100, 1000, -5])
    assert ranks is not None
    assert ranks.r == pytest.approx(1 - 6 * 12 / (4 * 15))  # Σd² = 1 + 1 + 1 + 9


def test_the_interval_is_fishers() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 3.0, 2.0, 5.0, 4.0, 6.0]
    found, interval = pearson(x, y), pearson_interval(x, y)
    assert found is not None
    assert interval is not None
    width = 1.959964 / math.sqrt(len(x) - 3)
    assert interval == pytest.approx(
        (math.tanh(math.atanh(found.r) - width), math.tanh(math.atanh(found.r) + width)), abs=1e-5
    )


@pytest.mark.parametrize("y", [[5.0, 5.0, 5.0], [1.0, 2.0]])
def test_too_few_points_or_none_that_vary_have_no_correlation(y: list[float]) -> None:
    x = list(range(len(y)))
    assert pearson(x, y) is spearman(x, y) is pearson_interval(x, y) is None


def test_gradients_are_the_slopes_of_the_loss(family: StudiedFamily) -> None:
    model = StudyModel.open(family.base)
    strings = [[5, 6, 7, 8, 9], [20, 30, 40]]
    gradients = gradient_locality.relative_gradients(model, strings)
    assert len(gradients) == 3
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    # Down the gradient by a step s, the loss falls by s |g|²: both sides from the loss alone.
    names = [name for name in model.names if name.startswith("model.layers.1.")]
    weights = math.sqrt(sum(float(model.get(name).square().sum()) for name in names))
    g_square = (gradients[1] * weights) ** 2
    slope = {}
    for name in names:
        parameter = model.module.get_parameter(name)
        parameter.requires_grad_()
    _loss(model, strings).backward()  # type: ignore[no-untyped-call]
    for name in names:
        parameter = model.module.get_parameter(name)
        assert parameter.grad is not None
        slope[name] = parameter.grad.clone()
        parameter.requires_grad_(False)
    step = 1e-3
    for name in names:
        model.put(name, model.get(name) + step * slope[name])
    above = float(_loss(model, strings))
    for name in names:
        model.put(name, model.get(name) - 2 * step * slope[name])
    below = float(_loss(model, strings))
    assert (above - below) / (2 * step) == pytest.approx(g_square, rel=0.02)


def _loss(model: StudyModel, strings: list[list[int]]) -> torch.Tensor:
    losses = [model.losses(torch.tensor([ids])).mean() for ids in strings]
    return torch.stack(losses).mean()


def test_what_moved_with_the_gradient_is_correlated(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32", layers=4)
    text = tmp_path / "text.txt"
    text.write_text("One paragraph of words.\n\n\n\nAnother paragraph.\n\nA third one.")
    with StudiedFamily.open(base, {"copy": base}) as family:
        gradients = gradient_locality.measure(family, text, num_strings=2).series["gradient"]
    least, most = min(gradients), max(gradients)
    # Each block moves by its gradient's place between 2 and 30 %, against it, or not at all.
    places = [(gradient - least) / (most - least) for gradient in gradients]
    with_it = [0.02 + 0.28 * place for place in places]
    against = [0.30 - 0.28 * place for place in places]
    folders = {
        name: make_variant(tmp_path / name, base, scale=_by_block(base, scales))
        for name, scales in (("with", with_it), ("against", against), ("still", [0.0] * 4))
    }
    with StudiedFamily.open(base, folders) as family:
        result = gradient_locality.measure(family, text, num_strings=2)
    along, opposed, still = records(result)
    assert along["spearman"] == pytest.approx(1.0)
    assert opposed["spearman"] == pytest.approx(-1.0)
    assert isinstance(along["pearson"], float)
    assert along["pearson"] > 0.9
    assert still["pearson"] is still["spearman"] is still["depth_spearman"] is None
    assert result.facts["strings"] == 2
    assert result.facts["still: shared blocks"] == 4
    assert fact(result, "still: 1 - cos of shared") == 0.0
    moved = result.series["with: 1 - cos"]
    expected = [1 - 1 / math.sqrt(1 + scale**2) for scale in with_it]
    assert list(moved) == pytest.approx(expected, rel=0.1)


def _by_block(base: Path, scales: list[float]) -> dict[str, float]:
    with StudiedFamily.open(base, {"copy": base}) as family:
        names = list(family.base.tensors)
    return {
        name: scale
        for layer, scale in enumerate(scales)
        for name in names
        if name.startswith(f"model.layers.{layer}.")
    }


def test_without_a_text_the_shipped_dialogues_are_read(family: StudiedFamily) -> None:
    result = gradient_locality.measure(family)
    assert result.facts["strings"] == 12
    assert len(result.series["gradient"]) == 3


def test_no_string_and_strings_of_one_token_are_refused(
    family: StudiedFamily, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match="1 or more"):
        gradient_locality.measure(family, num_strings=0)
    short = tmp_path / "short.txt"
    short.write_text("a")
    with pytest.raises(InvalidRequestError, match="two tokens"):
        gradient_locality.measure(family, short)
