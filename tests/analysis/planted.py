"""Tiny families whose deltas are known: written as checkpoints, with their Gram matrices.

Every tensor that FM looks at gets deltas Δ_i = s_i |W_B| (a_i u + sqrt(1 - a_i²) e_i) along
orthonormal directions u and e_1 … e_N of its own, so that what a study finds can be computed by
hand: <Δ_i, Δ_j> = s_i s_j |W_B|² (a_i a_j + [i = j] (1 - a_i²)).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from analysis.family import StudiedFamily
from analysis.selection import component_of
from tests.tiny import make_checkpoint, save_state

Floats = npt.NDArray[np.float64]
NAMES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A family on disk and what was planted into it."""

    base: Path
    variants: dict[str, Path]
    grams_NN: Mapping[str, Floats]  # tensor -> <Δ_i, Δ_j>, before rounding to the stored type

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.variants)

    def open(self) -> StudiedFamily:
        return StudiedFamily.open(self.base, self.variants)


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What is planted.

    Attributes:
        num_variants: N, called as in `NAMES`.
        shared: a_i² of every fine-tune: the share of its delta along the common direction.
        shares: Name -> a_i² of some fine-tunes, in the place of `shared`.
        scale: s_i of every fine-tune: |Δ_i| / |W_B|.
        scales: Name -> s_i of some, in the place of `scale`; 0 keeps the base's words.
        factors: (name, tensor) -> what s_i is multiplied with in that tensor alone.
        orthogonal: Whether directions are orthonormal; else they are random, as noise is.
    """

    num_variants: int = 5
    shared: float = 0.5
    shares: Mapping[str, float] = field(default_factory=dict)
    scale: float = 0.05
    scales: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[tuple[str, str], float] = field(default_factory=dict)
    orthogonal: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES[: self.num_variants]


def plant_family(
    folder: Path,
    structure: Structure | None = None,
    *,
    dtype: str = "float32",
    architecture: str = "qwen2",
    layers: int = 2,
    hidden: int = 48,
    intermediate: int = 80,
    seed: int = 0,
) -> Planted:
    """Writes a base and its fine-tunes into an existing folder.

    Norms, biases, embedding and head keep the base's words. With float32 the Gram matrices hold to
    about 1e-5 of their diagonal; bfloat16 rounds deltas to steps of 2^-8 of each weight.
    """
    structure = structure or Structure()
    base = make_checkpoint(
        folder / "base",
        architecture=architecture,
        dtype=dtype,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        seed=seed,
    )
    state = load_file(base / "model.safetensors")
    states = {name: dict(state) for name in structure.names}
    grams_NN: dict[str, Floats] = {}
    rng = np.random.default_rng(seed + 1)
    for tensor, weight in state.items():
        if component_of(tensor) is None:
            continue
        deltas_ND = _deltas(weight, tensor, structure, rng)
        grams_NN[tensor] = deltas_ND @ deltas_ND.T
        for name, delta_D in zip(structure.names, deltas_ND, strict=True):
            moved = weight.double() + torch.from_numpy(delta_D).view(weight.shape)
            states[name][tensor] = moved.to(weight.dtype)
    variants = {name: _write(folder / name, base, states[name]) for name in structure.names}
    return Planted(base=base, variants=variants, grams_NN=grams_NN)


def expected_gram(structure: Structure, *, base_square: float, tensor: str = "") -> Floats:
    """<Δ_i, Δ_j> in closed form, for orthonormal directions."""
    scales_N, a_N = _scales(structure, tensor), _along(structure)
    gram_NN: Floats = np.outer(scales_N * a_N, scales_N * a_N)
    gram_NN[np.diag_indices_from(gram_NN)] = scales_N**2
    return gram_NN * base_square


def _deltas(
    weight: torch.Tensor, tensor: str, structure: Structure, rng: np.random.Generator
) -> Floats:
    num_elements, num_variants = weight.numel(), structure.num_variants
    directions_DN = rng.standard_normal((num_elements, num_variants + 1))
    if structure.orthogonal:
        directions_DN = np.linalg.qr(directions_DN)[0]
    else:
        directions_DN /= np.linalg.norm(directions_DN, axis=0)
    shared_D, own_ND = directions_DN[:, 0], directions_DN[:, 1:].T
    a_N = _along(structure)
    norm = float(weight.double().norm())
    unit_ND = a_N[:, None] * shared_D + np.sqrt(1 - a_N**2)[:, None] * own_ND
    deltas_ND: Floats = norm * _scales(structure, tensor)[:, None] * unit_ND
    return deltas_ND


def _along(structure: Structure) -> Floats:
    return np.sqrt([structure.shares.get(name, structure.shared) for name in structure.names])


def _scales(structure: Structure, tensor: str) -> Floats:
    return np.array([
        structure.scales.get(name, structure.scale) * structure.factors.get((name, tensor), 1.0)
        for name in structure.names
    ])  # fmt: skip


def _write(folder: Path, base: Path, state: Mapping[str, torch.Tensor]) -> Path:
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_state(folder, state)
    return folder
