"""The colours of charts: seen on their ground, told apart by everybody, and even as a scale.

Colours are compared in OKLab (Ottosson, 2020); other colour vision is that of Machado, Oliveira and
Fernandes (2009) at full severity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations, pairwise
from math import dist

import pytest

from server.ui.assets import asset_files

THEMES = ("light", "dark")
MODELS = ("--c-donor", *(f"--m-{place}" for place in range(1, 9)))
SCALE = tuple(f"--e-{step}" for step in range(5))
VISIONS = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deutan": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritan": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
_LUMINANCE = (0.2126, 0.7152, 0.0722)
_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)

Vector = Sequence[float]


@pytest.mark.parametrize("theme", THEMES)
def test_models_are_seen_on_their_ground(theme: str) -> None:
    colours = tokens(theme)
    ground = colours["--surface"]
    for name in MODELS:
        assert contrast(colours[name], ground) >= 3, name


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("vision", VISIONS)
def test_models_are_told_apart(theme: str, vision: str) -> None:
    colours = tokens(theme)
    seen = {name: oklab(times(VISIONS[vision], colours[name])) for name in MODELS}
    for one, other in combinations(MODELS, 2):
        assert dist(seen[one], seen[other]) > 0.07, (one, other)


@pytest.mark.parametrize("theme", THEMES)
def test_scale_of_distances_is_even(theme: str) -> None:
    colours = tokens(theme)
    source = asset_files()["palette.js"].read_text()
    found = re.search(r"STEPS = \[([\d., ]+)\]", source)
    assert found is not None
    places = [float(place) for place in found[1].split(",")]
    seen = [oklab(colours[name]) for name in SCALE]
    lightness = [colour[0] for colour in seen]
    assert lightness == sorted(lightness, reverse=theme == "light")
    whole = sum(dist(a, b) for a, b in pairwise(seen))
    for (a, b), (start, end) in zip(pairwise(seen), pairwise(places), strict=True):
        assert dist(a, b) / whole == pytest.approx(end - start, abs=0.03)


def tokens(theme: str) -> dict[str, Vector]:
    """Returns a theme's colours as linear sRGB."""
    files = asset_files()
    text = "".join(files[name].read_text() for name in ("theme.css", "charts.css"))
    blocks = re.findall(rf':root\[data-theme="{theme}"\] {{(.*?)\n}}', text, re.DOTALL)
    pairs = re.findall(r"(--[\w-]+): #([0-9a-f]{6});", "".join(blocks))
    return {name: [linear(int(code[at : at + 2], 16)) for at in (0, 2, 4)] for name, code in pairs}


def linear(value: int) -> float:
    part = value / 255
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


def times(matrix: Sequence[Vector], vector: Vector) -> list[float]:
    products = (sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)
    return [min(max(value, 0.0), 1.0) for value in products]


def oklab(colour: Vector) -> list[float]:
    roots = [value ** (1 / 3) for value in times(_TO_LMS, colour)]
    return [sum(a * b for a, b in zip(row, roots, strict=True)) for row in _TO_LAB]


def contrast(one: Vector, other: Vector) -> float:
    """Returns the ratio of WCAG 2."""
    low, high = sorted(sum(a * b for a, b in zip(_LUMINANCE, c, strict=True)) for c in (one, other))
    return (high + 0.05) / (low + 0.05)
