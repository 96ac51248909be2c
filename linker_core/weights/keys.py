"""Tensor names of a checkpoint <-> (section, layer, parameter). Knows no file and no shape."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Section(StrEnum):
    """The four parts of a decoder-only model."""

    EMBED = "embed"
    BLOCKS = "blocks"
    FINAL_NORM = "final_norm"
    LM_HEAD = "lm_head"


EMBED_NAME = "model.embed_tokens.weight"
FINAL_NORM_NAME = "model.norm.weight"
LM_HEAD_NAME = "lm_head.weight"

_OUTSIDE_BLOCKS = {
    EMBED_NAME: Section.EMBED,
    FINAL_NORM_NAME: Section.FINAL_NORM,
    LM_HEAD_NAME: Section.LM_HEAD,
}
_BLOCK_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.([a-z0-9_]+(?:\.[a-z0-9_]+)+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorKey:
    """Where a tensor sits. `layer` is None outside the blocks."""

    section: Section
    layer: int | None
    parameter: str  # "self_attn.q_proj.weight" inside a block, else the whole name


def parse_key(name: str) -> TensorKey | None:
    """Returns the place of a tensor name, or None where no supported model has such a tensor."""
    if section := _OUTSIDE_BLOCKS.get(name):
        return TensorKey(section=section, layer=None, parameter=name)
    if match := _BLOCK_NAME.fullmatch(name):
        return TensorKey(section=Section.BLOCKS, layer=int(match[1]), parameter=match[2])
    return None


def block_name(layer: int, parameter: str) -> str:
    """Returns the checkpoint's name of a block's sub-parameter."""
    return f"model.layers.{layer}.{parameter}"
