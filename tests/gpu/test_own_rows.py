"""Rows of a table on a CUDA device: what is held of it, what that takes, and what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linker_core.engine.rows import RowMap
from linker_core.engine.token_leaves import look_up, project
from linker_core.engine.torch_arithmetic import TorchArithmetic
from linker_core.residency.loader import read_tensor
from linker_core.residency.own_rows import load_rows
from linker_core.residency.stored import StoredRows, StoredTensor
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME
from tests.tiny import make_checkpoint, make_variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CHANGED = tuple(range(0, 16_000, 40))
SLACK_BYTES = 16 * 2**20  # a chunk, its comparison, and the allocator's rounding


def load(variant: Checkpoint, base: StoredTensor) -> StoredRows:
    arriving = load_rows(variant, EMBED_NAME, base, num_own=len(CHANGED) + 1)
    while True:
        try:
            next(arriving)
        except StopIteration as end:
            table = end.value
            assert isinstance(table, StoredRows)
            return table


def test_own_rows_are_all_that_stays_and_give_what_the_whole_table_gives(tmp_path: Path) -> None:
    device = torch.device("cuda")
    donor = make_checkpoint(
        tmp_path / "base", layers=1, hidden=1024, intermediate=64, vocab_size=16_000
    )
    path = make_variant(
        tmp_path / "v", donor, scale=0.0, rows={EMBED_NAME: CHANGED}, added_tokens=("<a>",)
    )
    with Checkpoint.open(donor) as a, Checkpoint.open(path) as b:
        base = StoredTensor(tensor=read_tensor(a, EMBED_NAME, device=device))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        table = load(b, base)
        assert 0 <= torch.cuda.memory_allocated() - before - table.nbytes <= 1024
        assert torch.cuda.max_memory_allocated() - before <= table.nbytes + SLACK_BYTES
        whole = read_tensor(b, EMBED_NAME, device=device)
    assert table.positions.tolist() == [*CHANGED, 16_000]
    slots = [0, 1, 0, 1, 1]
    rows = RowMap(slots, device=device)
    ids_T = torch.tensor([40, 40, 15_999, 16_000, 41], device=device)
    found_TH = look_up(ids_T, rows, [base, table], dtype=torch.bfloat16)
    x_TH = torch.randn(5, 1024, device=device, dtype=torch.bfloat16) / 32
    logits_TV = project(x_TH, rows, [base, table], arithmetic=TorchArithmetic())
    for row, slot in enumerate(slots):
        plain = whole if slot else base.tensor
        assert torch.equal(found_TH[row], plain[ids_T[row]])
        want = plain.float() @ x_TH[row].float()
        got = logits_TV[row, : len(want)].float()
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
        assert not logits_TV[row, len(want) :].any()
