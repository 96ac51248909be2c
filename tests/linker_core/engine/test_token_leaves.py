"""Tables of which a variant holds some rows give what its whole table would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from linker_core.engine.arithmetic import Addend, Arithmetic
from linker_core.engine.rows import RowMap
from linker_core.engine.token_leaves import look_up, project
from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.stored import Stored, StoredResidual, StoredRows, StoredTensor
from linker_core.sharing.rungs import Residual, parse_rung
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.engine.families import (
    ARITHMETICS,
    CPU,
    Family,
    build_family,
    dense,
    reference_logits,
    reference_model,
    relative_error,
    split_table,
    stored_tensors,
)
from tests.linker_core.engine.test_routing import CountingArithmetic
from tests.linker_core.engine.test_runner import TOLERANCE, Stream, tokens_of
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant, save_state

HIDDEN = 8
UP = "model.layers.1.mlp.up_proj.weight"
TABLES = (EMBED_NAME, LM_HEAD_NAME)


def random_table(rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=generator).bfloat16()


def variant_table(
    base: StoredTensor, num_rows: int, changed: set[int], generator: torch.Generator
) -> StoredRows:
    table = random_table(num_rows, generator)
    for row in range(min(num_rows, base.num_rows)):
        if row not in changed:
            table[row] = base.tensor[row]
    return split_table(base, table)


RESIDUALS = ("signs:32", "int2:64", "int3:32", "int4:128", "rank3:4", "rank2:8", "rank2:16")
COMBINED = ("rank2:8+int2:32", "rank1:16+signs:32", "rank2:4+int3:64")


def coded_table(
    base: StoredTensor, num_rows: int, rung: str, generator: torch.Generator
) -> StoredResidual:
    parsed = parse_rung(rung)
    assert isinstance(parsed, Residual)
    return DeltaEncoder(base, random_table(num_rows, generator)).encode(parsed)


def make_tables(
    seed: int, variants: list[tuple[int, set[int]]], coded: Sequence[tuple[int, str]] = ()
) -> tuple[list[Stored], torch.Generator]:
    """A donor of 20 rows, an alias, a stranger of 22, and variants that hold rows of their own.

    Then those that hold a delta, of so many rows and on which rung.
    """
    generator = torch.Generator().manual_seed(seed)
    donor = StoredTensor(tensor=random_table(20, generator))
    stranger = StoredTensor(tensor=random_table(22, generator))
    split = [variant_table(donor, rows, changed, generator) for rows, changed in variants]
    deltas = [coded_table(donor, rows, rung, generator) for rows, rung in coded]
    return [donor, donor, stranger, *split, *deltas], generator


VARIANTS = st.lists(
    st.tuples(st.integers(1, 24), st.sets(st.integers(0, 19))), min_size=1, max_size=3
)


CODED = st.lists(
    st.tuples(st.integers(1, 24), st.sampled_from((*RESIDUALS, *COMBINED))), min_size=1, max_size=3
)


@pytest.mark.parametrize("kind", ARITHMETICS)
@given(seed=st.integers(0, 1000), variants=VARIANTS, coded=CODED, data=st.data())
@settings(max_examples=60, deadline=None)
def test_tables_held_in_part_give_what_whole_ones_give(
    kind: type[Arithmetic],
    seed: int,
    variants: list[tuple[int, set[int]]],
    coded: list[tuple[int, str]],
    data: st.DataObject,
) -> None:
    tables, generator = make_tables(seed, variants, coded)
    slots = data.draw(st.lists(st.integers(0, len(tables) - 1), min_size=1, max_size=9))
    rows = RowMap(slots, device=CPU)
    serving = [tables[slot] for slot in rows.distinct]
    ids = [data.draw(st.integers(0, tables[slot].num_rows - 1)) for slot in slots]
    found = look_up(torch.tensor(ids), rows, serving, dtype=torch.float32)
    x_TH = torch.randn(len(slots), HIDDEN, generator=generator)
    logits = project(x_TH, rows, serving, arithmetic=kind())
    assert logits.shape == (len(slots), max(table.num_rows for table in serving))
    for row, slot in enumerate(slots):
        table = dense(tables[slot]).float()
        assert torch.equal(found[row], table[ids[row]])
        torch.testing.assert_close(
            logits[row, : len(table)], table @ x_TH[row], rtol=1e-4, atol=1e-4
        )
        assert not logits[row, len(table) :].any()


@pytest.mark.parametrize("rung", [*RESIDUALS, *COMBINED])
def test_look_up_of_a_row_is_the_same_whatever_is_looked_up_beside_it(rung: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base = StoredTensor(tensor=torch.randn(300, 50, generator=generator).bfloat16())
    variant_VH = torch.randn(303, 50, generator=generator).bfloat16()
    parsed = parse_rung(rung)
    assert isinstance(parsed, Residual)
    table = DeltaEncoder(base, variant_VH).encode(parsed)
    ids = torch.randint(303, (70,), generator=generator)
    ids[:4] = torch.tensor([302, 300, 0, 299])
    rows = RowMap([0] * len(ids), device=CPU)
    together = look_up(ids, rows, [table], dtype=torch.float32)
    for row, token in enumerate(ids.tolist()):
        alone = look_up(ids[row : row + 1], RowMap([0], device=CPU), [table], dtype=torch.float32)
        assert torch.equal(alone[0], together[row])
        assert torch.equal(alone[0], dense(table)[token])
    assert torch.equal(together[0], variant_VH[302].float())


def test_project_computes_the_donors_table_once_for_all_that_lean_on_it() -> None:
    tables, generator = make_tables(1, [(24, {3, 7}), (18, {0}), (20, set())])
    # The donor, an alias, and the three that hold rows; two rows each, apart from each other.
    slots = [0, 1, 3, 4, 5, 0, 1, 3, 4, 5]
    rows = RowMap(slots, device=CPU)
    counting = CountingArithmetic()
    x_TH = torch.randn(len(slots), HIDDEN, generator=generator)
    project(x_TH, rows, [tables[slot] for slot in rows.distinct], arithmetic=counting)
    # One for everybody, one for each variant that has rows of its own.
    assert counting.rows == [10, 2, 2]


def test_project_adds_all_deltas_to_the_donors_product_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables, generator = make_tables(1, [(24, {3, 7})], [(20, "int4:32"), (23, "rank2:8")])
    slots = [0, 1, 3, 4, 5, 0, 1, 3, 4, 5]
    rows = RowMap(slots, device=CPU)
    counting, added = CountingArithmetic(), []
    add = counting.add_residuals

    def noted(x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
        added.append([addend.residual for addend in addends])
        add(x_TI, addends)

    monkeypatch.setattr(counting, "add_residuals", noted)
    x_TH = torch.randn(len(slots), HIDDEN, generator=generator)
    project(x_TH, rows, [tables[slot] for slot in rows.distinct], arithmetic=counting)
    # One for everybody, one for the rows of each variant that has some to itself.
    assert counting.rows == [10, 2, 2]
    assert added == [[tables[4], tables[5]]]


def test_look_up_of_an_id_beyond_a_whole_table_is_an_error() -> None:
    tables, _ = make_tables(2, [(20, {1})])
    with pytest.raises(IndexError):
        look_up(torch.tensor([20]), RowMap([0], device=CPU), tables[:1], dtype=torch.float32)


def cut_vocabulary(path: Path, num_rows: int) -> None:
    """Lets a checkpoint have only its first tokens."""
    state = load_file(path / "model.safetensors")
    state |= {name: state[name][:num_rows].clone() for name in TABLES if name in state}
    save_state(path, state)
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(record | {"vocab_size": num_rows}))


def is_table(name: str) -> bool:
    return name in TABLES


def same_weight(name: str) -> bool:
    return name != UP and not is_table(name)


def sharing_family(tmp_path: Path, architecture: str, *, tie: bool) -> tuple[Family, list[Path]]:
    """Donor, added tokens, aliased tables, a stranger, and a shorter vocabulary: slots 0 to 4."""
    base = make_checkpoint(tmp_path / "base", architecture=architecture, tie=tie)
    names = TABLES[:1] if tie else TABLES
    changed = {name: (5 + n, 17, 300) for n, name in enumerate(names)}
    paths = [
        base,
        make_variant(
            tmp_path / "added", base, scale={UP: 0.4}, added_tokens=("<a>", "<b>"), rows=changed
        ),
        make_variant(tmp_path / "near", base, scale={UP: 0.4}, seed=2),
        make_variant(tmp_path / "far", base, scale=0.4, seed=3),
        make_variant(tmp_path / "short", base, scale={UP: 0.4}, seed=4, rows=changed),
    ]
    cut_vocabulary(paths[4], 500)
    family = build_family(base)
    donor = family.stored[0]
    added, near, far, short = paths[1:]
    family.add(stored_tensors(added, donor=donor, aliased=same_weight, by_rows=is_table))
    family.add(stored_tensors(near, donor=donor, aliased=lambda name: name != UP))
    family.add(stored_tensors(far))
    family.add(stored_tensors(short, donor=donor, aliased=same_weight, by_rows=is_table))
    return family, paths


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_variants_with_rows_of_their_own_give_the_unlinked_models_logits(
    tmp_path: Path, architecture: str, tie: bool
) -> None:
    family, paths = sharing_family(tmp_path, architecture, tie=tie)
    widths = [512, 514, 512, 512, 500]
    special = [[], [512, 5, 513, 17, 6], [5, 17], [], [17, 499, 5]]
    tokens = [[*special[s], *tokens_of(s, 30, vocab=widths[s])] for s in range(5)]
    references = [
        reference_logits(reference_model(path), t) for path, t in zip(paths, tokens, strict=True)
    ]
    streams = [Stream(family, slot, tokens[slot]) for slot in range(5)]
    # Alone, in pairs and all together: prefills and decodes side by side.
    plan = [{1: 3}, {4: 5}, {1: 4, 4: 1}, {0: 6, 1: 1, 2: 3, 3: 7, 4: 2}, {4: 4, 1: 9, 0: 1}]
    plan += [dict.fromkeys((2, 1, 3, 4, 0), 1)]
    for step in plan:
        chunks = [streams[slot].chunk(n) for slot, n in step.items()]
        logits = family.runner.forward(chunks).logits_RV
        assert logits.shape[1] == max(widths[slot] for slot in step)
        for row, slot in enumerate(step):
            want = references[slot][streams[slot].done - 1]
            assert relative_error(logits[row, : widths[slot]], want) <= TOLERANCE
            assert not logits[row, widths[slot] :].any()


def test_forward_head_of_the_donor_is_one_product(tmp_path: Path) -> None:
    family, _ = sharing_family(tmp_path, "qwen2", tie=True)
    counting = CountingArithmetic()
    family.runner.context.arithmetic = counting
    streams = [Stream(family, slot, tokens_of(slot, 4, vocab=500)) for slot in range(5)]
    family.runner.forward([stream.chunk(4) for stream in streams])
    # The last products of a step are the head's: everybody but the stranger, the stranger, and
    # the own rows of two variants.
    assert counting.rows[-4:] == [4, 1, 1, 1]
    assert counting.rows[-5] > 1
