"""A plan's own arithmetic, and its way through JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from linker_core.sharing.plan import SharePlan, count_blocks, plan_bytes, rows_bytes
from linker_core.sharing.planner import plan_donor
from linker_core.sharing.price import Price
from linker_core.sharing.rungs import Residual, Rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.tiny import make_checkpoint, make_variant

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
PRICE = Price(
    kl=0.01, kl_upper=0.02, top1=0.99, ppl_ratio=1.01, tokens=4000, calibration="ab",
    matmul_precision="highest", encoding=1,
)  # fmt: skip


@pytest.fixture
def donor(tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(make_checkpoint(tmp_path / "donor", tie=False)) as checkpoint:
        yield checkpoint


def test_plan_bytes_count_what_each_rung_holds(tmp_path: Path, donor: Checkpoint) -> None:
    path = make_variant(tmp_path / "v", donor.path, scale=0.0, added_tokens=("<a>", "<b>"))
    with Checkpoint.open(path) as variant:
        rungs = dict.fromkeys(variant.tensors, Rung.ALIAS)
        rungs |= {EMBED_NAME: Rung.ROWS, LM_HEAD_NAME: Rung.OWN, UP: Rung.OWN}
        size = plan_bytes(rungs, {EMBED_NAME: 5}, donor=donor, variant=variant)
        assert size.logical_bytes == variant.nbytes
        head, up = variant.tensors[LM_HEAD_NAME].nbytes, variant.tensors[UP].nbytes
        # Rows of 48 bfloat16 numbers, each with a position of 8 bytes; 514 and 80 of them whole.
        assert (head, up) == (514 * 96, 80 * 96)
        assert size.unique_bytes == 5 * (96 + 8) + head + up


def test_rows_bytes_of_no_rows_is_nothing(donor: Checkpoint) -> None:
    assert rows_bytes(donor.tensors[EMBED_NAME], 0) == 0
    assert rows_bytes(donor.tensors[EMBED_NAME], 512) == 512 * (96 + 8)


def test_count_blocks_takes_the_dearest_rung_among_matrices(donor: Checkpoint) -> None:
    rungs = dict.fromkeys(donor.tensors, Rung.ALIAS) | {EMBED_NAME: Rung.OWN, NORM: Rung.OWN}
    assert count_blocks(rungs, donor).to_json() == {"alias": 2, "residual": 0, "own": 0, "total": 2}
    blocks = count_blocks(rungs | {UP: Residual(bits=4, group=64)}, donor)
    assert blocks.to_json() == {"alias": 1, "residual": 1, "own": 0, "total": 2}


@pytest.mark.parametrize("price", [None, PRICE])
def test_plan_survives_json(donor: Checkpoint, price: Price | None) -> None:
    plan = plan_donor(donor, fingerprint="f")
    plan = replace(
        plan,
        rungs=dict(plan.rungs) | {EMBED_NAME: Rung.ROWS, UP: Rung.ALIAS},
        own_rows={EMBED_NAME: 3},
        price=price,
        budget_kl=None if price is None else 0.05,
        tau_cos=0.99,
        donor_fingerprint="d",
    )
    record = json.loads(json.dumps(plan.to_json()))
    assert SharePlan.from_json(record) == plan
    assert {"unique_bytes", "shared_bytes", "blocks_shared"} <= set(record)
