"""Attention heads in another order (BS table 3): the same function, another point in weight space.

With grouped-query attention a key-value head serves a group of query heads: groups move whole, and
query heads change places within their group.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.probes import symmetry
from analysis.probes.blocks import ATTENTION, MIDDLE, PROJECTIONS, Block
from analysis.probes.result import ProbeResult
from linker_core.errors import InvalidRequestError
from linker_core.weights.architecture import ModelConfig

add_arguments = symmetry.add_arguments


def run(family: StudiedFamily, args: argparse.Namespace) -> ProbeResult:
    """Permutes the heads of every variant; see `symmetry.Control`."""
    return measure(family, blocks=args.blocks, seed=args.seed)


def measure(family: StudiedFamily, *, blocks: str = MIDDLE, seed: int = 0) -> ProbeResult:
    """Compares attention before and after a random permutation of heads with the base's.

    Raises:
        InvalidRequestError: The model has a single head.
    """
    config = family.base.config
    if config.num_heads == 1:
        raise InvalidRequestError("The model has one attention head: there is nothing to permute.")
    control = symmetry.Control(
        symmetry=permute_heads,
        title="Attention heads permuted",
        parts=(ATTENTION, PROJECTIONS),
        notes=(
            f"{config.num_kv_heads} groups of {config.num_heads // config.num_kv_heads} query "
            "heads. Groups move whole, none stays where it was, and heads are shuffled within "
            "their group; with one group no head stays. BS (table 3, any permutation): cosine "
            "0.999-1.000 to 0.07-0.15.",
        ),
    )
    return control.measure(family, blocks=blocks, seed=seed)


def permute_heads(
    block: Block, config: ModelConfig, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Returns the block with its heads in another order: rows of q, k, v and columns of o.

    Deviates from BS 3.3: no group keeps its place, because with few groups a uniform permutation
    often leaves most of the block as it was, and a control that changes nothing shows nothing.
    """
    kv_order, q_order = _orders(config, rng)
    moved = dict(block)
    for name, values in block.items():
        if name == "self_attn.o_proj.weight":
            moved[name] = _gather(values.T, q_order, config.head_dim).T.copy()
        elif name.startswith("self_attn.q_proj."):
            moved[name] = _gather(values, q_order, config.head_dim)
        elif name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            moved[name] = _gather(values, kv_order, config.head_dim)
    return moved


def _orders(
    config: ModelConfig, rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns which key-value head and which query head takes each place."""
    num_groups = config.num_kv_heads
    group_size = config.num_heads // num_groups
    if num_groups == 1:
        return np.zeros(1, dtype=np.intp), _derangement(group_size, rng)
    groups = _derangement(num_groups, rng)
    heads = [group * group_size + rng.permutation(group_size) for group in groups]
    return groups, np.concatenate(heads)


def _derangement(count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Returns a uniformly random order in which nothing keeps its place. `count` is above 1."""
    while True:  # more than a third of all orders will do
        order = rng.permutation(count)
        if not np.any(order == np.arange(count)):
            return order.astype(np.intp)


def _gather(
    values: NDArray[np.float32], order: NDArray[np.intp], head_dim: int
) -> NDArray[np.float32]:
    """Returns rows in the order of whole heads; a bias is a column of rows."""
    heads = values.reshape(len(order), head_dim, *values.shape[1:])
    moved: NDArray[np.float32] = heads[order].reshape(values.shape)
    return moved
