"""The MLP's neurons in another order (BS 3.3): the same function, another point in weight space."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from analysis.probes import symmetry
from analysis.probes.blocks import MLP, Block
from linker_core.weights.architecture import ModelConfig


def permute_neurons(
    block: Block, config: ModelConfig, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Returns the block with π over its intermediate width: rows of gate and up, columns of down.

    down(act(gate x) ⊙ up x) is a sum over neurons, so their order does not matter.
    """
    order = rng.permutation(config.intermediate_size)
    moved = dict(block)
    for name in block:
        if name == "mlp.down_proj.weight":
            moved[name] = np.ascontiguousarray(block[name][:, order])
        elif name.startswith(("mlp.gate_proj.", "mlp.up_proj.")):
            moved[name] = block[name][order]
    return moved


CONTROL = symmetry.Control(
    symmetry=permute_neurons,
    title="MLP neurons permuted",
    parts=(MLP,),
    notes=(
        "One uniformly random permutation over the rows of gate and up and the columns of "
        "down. BS: cosine 1.000 to 0.002 on block 14 of Qwen2.5-1.5B.",
    ),
)
add_arguments = symmetry.add_arguments
run, measure = CONTROL.run, CONTROL.measure
