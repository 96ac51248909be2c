"""What a stored plan says of each block and section, without opening a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from linker_core.errors import InvalidRequestError
from linker_core.sharing.plan import tensor_bytes
from linker_core.sharing.rungs import COARSE, AnyRung, Rung, coarse, parse_rung
from linker_core.weights.architecture import DTYPE_BYTES, ModelConfig
from linker_core.weights.keys import Section, TensorKey, parse_key
from linker_core.weights.safetensors_header import TensorInfo
from linker_core.weights.shapes import expected_tensors

_MATRIX = "_proj.weight"  # how a block's matrices are called; its norms and biases are vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBlock:
    """One block of a variant as its plan stores it."""

    index: int
    rung: str  # the dearest among its matrices, of `rungs.COARSE`
    unique_bytes: int | None  # None: the shapes are not known, or are not those of the plan


class PlanParts(NamedTuple):
    """What a plan stores, by block and by section."""

    blocks: list[PlanBlock]  # in order
    sections: dict[Section, int] | None  # unique bytes; None as above. A tied head has none


def parts_of(plan: Mapping[str, Any], config: ModelConfig | None = None) -> PlanParts:
    """Returns the blocks and sections of a plan.

    Args:
        plan: `SharePlan.to_json`, of any age.
        config: The model's. A plan holds no shapes; without them no bytes are known.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: The plan is damaged.
    """
    rungs = {_key(name): _rung(rung) for name, rung in plan["rungs"].items()}
    dearest = _dearest(rungs)
    tensors = None if config is None else _tensor_bytes(plan, rungs, config)
    if tensors is None:
        return PlanParts([_block(i, dearest[i], None) for i in sorted(dearest)], None)
    blocks = dict.fromkeys(dearest, 0)
    sections = dict.fromkeys((key.section for key in tensors), 0)
    for key, nbytes in tensors.items():
        sections[key.section] += nbytes
        if key.layer is not None:
            blocks[key.layer] += nbytes
    return PlanParts([_block(i, dearest[i], blocks[i]) for i in sorted(dearest)], sections)


def blocks_of(plan: Mapping[str, Any], config: ModelConfig | None = None) -> list[PlanBlock]:
    """Returns the blocks of a plan; see `parts_of`."""
    return parts_of(plan, config).blocks


def _block(index: int, rung: str, unique_bytes: int | None) -> PlanBlock:
    return PlanBlock(index=index, rung=rung, unique_bytes=unique_bytes)


def _key(name: str) -> TensorKey:
    key = parse_key(name)
    if key is None:
        raise ValueError(f"{name!r:.100} is no tensor of a supported model")
    return key


def _rung(text: str) -> AnyRung:
    try:
        return parse_rung(text)
    except InvalidRequestError as error:  # nobody asked for it: the plan is damaged
        raise ValueError(error.message) from error


def _dearest(rungs: Mapping[TensorKey, AnyRung]) -> dict[int, str]:
    """Returns the dearest rung among the matrices of each block."""
    dearest: dict[int, str] = {}
    for key, rung in rungs.items():
        if key.layer is not None and key.parameter.endswith(_MATRIX):
            before = dearest.get(key.layer, Rung.ALIAS.value)
            dearest[key.layer] = max(before, coarse(rung), key=COARSE.index)
    return dearest


def _tensor_bytes(
    plan: Mapping[str, Any], rungs: Mapping[TensorKey, AnyRung], config: ModelConfig
) -> dict[TensorKey, int] | None:
    """Returns the unique bytes of every tensor, or None where they do not add up to the plan's.

    They do not where a tensor has another type than its config declares, or where an embedding has
    rows that the donor's lacks.
    """
    item_bytes = DTYPE_BYTES[config.dtype]
    tensors: dict[TensorKey, int] = {}
    for name, shape in expected_tensors(config).items():
        key = _key(name)
        if key not in rungs:
            return None
        info = TensorInfo(
            name=name,
            dtype=config.dtype,
            shape=shape,
            nbytes=math.prod(shape) * item_bytes,
            shard=0,
            offset=0,
        )
        own_rows = plan["own_rows"].get(name)
        if rungs[key] is Rung.ROWS and own_rows is None:
            raise ValueError(f"the plan does not say how many rows of {name!r} are its own")
        tensors[key] = tensor_bytes(rungs[key], info, num_own_rows=own_rows, donor=info)
    same = len(tensors) == len(rungs) and sum(tensors.values()) == plan["unique_bytes"]
    return tensors if same else None
