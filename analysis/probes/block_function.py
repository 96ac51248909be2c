"""What a decoder layer computes, to see whether two sets of weights are the same function.

Legend: T tokens, H hidden width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.model import study_skeleton
from analysis.probes.blocks import Block
from linker_core.weights.architecture import ModelConfig

NUM_TOKENS = 32


class BlockFunction:
    """One layer of a family in float32, fed with the same random tokens every time.

    Args:
        config: Shape and arithmetic of the family.
        layer: From 0.
        seed: Of the inputs, standard normal.
    """

    def __init__(self, config: ModelConfig, layer: int, *, seed: int) -> None:
        model = study_skeleton(config, device=torch.device("cpu"), dtype=torch.float32)
        body = model.get_submodule("model")
        self._block: nn.Module = body.get_submodule(f"layers.{layer}")
        generator = torch.Generator().manual_seed(seed)
        self._x_1TH = torch.randn(1, NUM_TOKENS, config.hidden_size, generator=generator)
        positions = torch.arange(NUM_TOKENS).unsqueeze(0)
        rotary = body.get_submodule("rotary_emb")
        self._rope = rotary(self._x_1TH, position_ids=positions)
        future = torch.full((NUM_TOKENS, NUM_TOKENS), -torch.inf).triu(1)
        self._mask = future.view(1, 1, NUM_TOKENS, NUM_TOKENS)

    @torch.inference_mode()
    def __call__(self, weights: Block) -> NDArray[np.float32]:
        """Returns the layer's output [T, H] with these weights."""
        state = {name: torch.from_numpy(values) for name, values in weights.items()}
        self._block.load_state_dict(state, assign=True)
        out = self._block(
            self._x_1TH, position_embeddings=self._rope, attention_mask=self._mask, use_cache=False
        )
        assert isinstance(out, torch.Tensor)
        values: NDArray[np.float32] = out[0].numpy()
        return values
