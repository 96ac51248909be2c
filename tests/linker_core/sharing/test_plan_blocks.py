from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from linker_core.sharing.plan import SharePlan, count_blocks, plan_bytes
from linker_core.sharing.plan_blocks import PlanBlock, blocks_of, parts_of
from linker_core.sharing.planner import plan_donor
from linker_core.sharing.rungs import AnyRung, Residual, Rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, FINAL_NORM_NAME, LM_HEAD_NAME, Section, block_name
from tests.tiny import ARCHITECTURES, make_checkpoint

UP, NORM, DOWN = (
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.mlp.down_proj.weight",
)
INT4 = Residual(bits=4, group=64)


def block(index: int, rung: str, unique_bytes: int | None) -> PlanBlock:
    return PlanBlock(index=index, rung=rung, unique_bytes=unique_bytes)


@pytest.fixture
def donor(tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(make_checkpoint(tmp_path / "donor", tie=False)) as checkpoint:
        yield checkpoint


def plan_of(
    donor: Checkpoint, rungs: dict[str, AnyRung], own_rows: dict[str, int] | None = None
) -> dict[str, Any]:
    """A stored plan of a variant of the donor's shape, whose other tensors are aliased."""
    all_rungs: dict[str, AnyRung] = {**dict.fromkeys(donor.tensors, Rung.ALIAS), **rungs}
    size = plan_bytes(all_rungs, own_rows or {}, donor=donor, variant=donor)
    plan = replace(
        plan_donor(donor, fingerprint="v"),
        rungs=all_rungs,
        own_rows=own_rows or {},
        unique_bytes=size.unique_bytes,
        blocks=count_blocks(all_rungs, donor),
    )
    return plan.to_json()


def test_rung_of_a_block_is_the_dearest_among_its_matrices(donor: Checkpoint) -> None:
    plan = plan_of(donor, {UP: INT4, NORM: Rung.OWN, EMBED_NAME: Rung.OWN})
    assert blocks_of(plan) == [block(0, "alias", None), block(1, "residual", None)]
    plan = plan_of(donor, {UP: INT4, DOWN: Rung.OWN})
    assert [each.rung for each in blocks_of(plan)] == ["alias", "own"]


def test_bytes_are_those_of_each_block_and_section(donor: Checkpoint) -> None:
    rows = {EMBED_NAME: 3}
    rungs: dict[str, AnyRung] = {UP: INT4, NORM: Rung.OWN, EMBED_NAME: Rung.ROWS}
    parts = parts_of(plan_of(donor, rungs, rows), donor.config)
    # 80 rows of 48 weights: 4-bit codes in runs of 128, one scale of 2 bytes.
    assert parts.blocks == [block(0, "alias", 48 * 2), block(1, "residual", 80 * (64 + 2))]
    assert parts.sections == {
        Section.EMBED: 3 * (96 + 8),
        Section.BLOCKS: 48 * 2 + 80 * 66,
        Section.FINAL_NORM: 0,
        Section.LM_HEAD: 0,
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_parts_of_a_donor_are_all_of_it(tmp_path: Path, architecture: str, tie: bool) -> None:
    path = make_checkpoint(tmp_path / "donor", architecture=architecture, tie=tie)
    with Checkpoint.open(path) as checkpoint:
        parts = parts_of(plan_donor(checkpoint, fingerprint="f").to_json(), checkpoint.config)
        tensors = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    assert parts.sections is not None
    assert sum(parts.sections.values()) == sum(tensors.values())
    assert (Section.LM_HEAD in parts.sections) is not tie
    assert parts.sections[Section.FINAL_NORM] == tensors[FINAL_NORM_NAME]
    for each in parts.blocks:
        own = [size for name, size in tensors.items() if f".layers.{each.index}." in name]
        assert each == block(each.index, "own", sum(own))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_decides_and_no_vector_does(tmp_path: Path, architecture: str) -> None:
    with Checkpoint.open(make_checkpoint(tmp_path / "d", architecture=architecture)) as donor:
        for name, info in donor.tensors.items():
            plan = plan_of(donor, {name: Rung.OWN})
            counted = SharePlan.from_json(plan).blocks
            assert sum(each.rung == "own" for each in blocks_of(plan)) == counted.own, name
            assert counted.own == (len(info.shape) == 2 and name != EMBED_NAME)


def test_shapes_that_are_not_the_plans_give_no_bytes(donor: Checkpoint) -> None:
    plan = plan_of(donor, {UP: Rung.OWN})
    for other in (
        replace(donor.config, dtype="float32"),
        replace(donor.config, intermediate_size=96),
        replace(donor.config, num_layers=1),
        replace(donor.config, num_layers=3),
        replace(donor.config, tie_word_embeddings=True),
    ):
        parts = parts_of(plan, other)
        assert parts == ([block(0, "alias", None), block(1, "own", None)], None)


def test_sizes_add_up_whatever_the_rungs(donor: Checkpoint) -> None:
    choices = (Rung.ALIAS, Rung.OWN, INT4, Residual(rank=2, factor_bits=8))
    matrices = [
        block_name(layer, f"{part}_proj.weight")
        for layer in (0, 1)
        for part in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")
    ]
    for shift in range(len(choices)):
        rungs = {
            name: choices[(place + shift) % len(choices)]
            for place, name in enumerate([*matrices, LM_HEAD_NAME])
        }
        plan = plan_of(donor, rungs)
        parts = parts_of(plan, donor.config)
        assert parts.sections is not None
        assert sum(parts.sections.values()) == plan["unique_bytes"] > 0
        in_blocks = [each.unique_bytes for each in parts.blocks]
        assert math.fsum(size or 0 for size in in_blocks) == parts.sections[Section.BLOCKS]


@pytest.mark.parametrize(
    "rungs", [{"model.odd": "own"}, {UP: "int9:64"}, {UP: None}, {"lm_head.weight": 3}]
)
def test_damaged_plan_is_said_to_be(rungs: dict[str, Any]) -> None:
    with pytest.raises((AttributeError, ValueError)):
        blocks_of({"rungs": rungs, "own_rows": {}, "unique_bytes": 0})


@pytest.mark.parametrize("name", [EMBED_NAME, NORM])
def test_rows_of_which_no_number_is_stored_are_damage(donor: Checkpoint, name: str) -> None:
    plan = plan_of(donor, {EMBED_NAME: Rung.ROWS}, {EMBED_NAME: 3})
    rungs = {**plan["rungs"], name: "rows"}
    with pytest.raises(ValueError, match="rows"):
        parts_of({**plan, "rungs": rungs, "own_rows": {}}, donor.config)
