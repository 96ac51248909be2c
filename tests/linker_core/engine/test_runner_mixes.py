"""Random plans, mixes of variants, chunkings, orders and pages: every sequence gets its own logits.

With compiled arithmetic these are the same to the last bit, whatever else is in the batch.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from linker_core.engine.arithmetic import Arithmetic
from linker_core.engine.cpu import arithmetic as compiled_module
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.page_table import PageTable
from linker_core.engine.runner import Chunk
from linker_core.engine.torch_arithmetic import TorchArithmetic
from linker_core.residency.stored import Stored, StoredResidual
from linker_core.sharing.rungs import Residual, parse_rung
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.engine.families import (
    ARITHMETICS,
    Family,
    Storages,
    build_family,
    reference_logits,
    reference_model,
    relative_error,
    stored_tensors,
)
from tests.linker_core.residency.deltas import RESIDUALS
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant

VOCAB = 300
ADDED = 2  # tokens, of the variant in slot 1
MAX_TOKENS = 40
TABLES = (EMBED_NAME, LM_HEAD_NAME)
PLAIN_TOLERANCE = 1e-4


@dataclass
class Sequence:
    """Tokens of one slot, computed chunk by chunk."""

    slot: int
    tokens: list[int]
    table: PageTable
    done: int = 0

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


class Batches:
    """Computes sequences of a family in batches, and keeps the logits of every position."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.rows: dict[int, torch.Tensor] = {}  # by the sequence's id

    def step(self, parts: list[tuple[Sequence, int]]) -> list[bool]:
        """Computes the next so many tokens of each; returns whether they are finite."""
        chunks: list[Chunk] = []
        for sequence, length in parts:
            start, sequence.done = sequence.done, sequence.done + length
            assert self.family.cache.grow(sequence.table, sequence.done)
            chunks.append(
                Chunk(
                    slot=sequence.slot,
                    token_ids=sequence.tokens[start : sequence.done],
                    start=start,
                    table=sequence.table,
                    num_logits=length,
                )
            )
        logits_RV, finite = self.family.runner.forward(chunks)
        first = 0
        for sequence, length in parts:
            part_nV, first = logits_RV[first : first + length], first + length
            width = self.family.stored[sequence.slot][LM_HEAD_NAME].num_rows
            assert not part_nV[:, width:].any()
            known = self.rows.get(id(sequence), part_nV.new_empty(0, width))
            self.rows[id(sequence)] = torch.cat([known, part_nV[:, :width]])
        assert first == len(logits_RV)
        return finite

    def release(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.family.cache.release(sequence.table)
            sequence.done = 0


class RandomPlan:
    """Draws what a variant holds of each tensor.

    Args:
        chance: What is drawn depends on it, and on the name.
        tables: Whether embedding and head may be aliased.
    """

    def __init__(self, chance: random.Random, *, tables: bool = True) -> None:
        self._share, self._coded = chance.random(), chance.random()
        self._drawn = chance.randrange(1 << 30)
        self._tables = tables

    def stored(self, path: Path, donor: Storages) -> dict[str, Stored]:
        return stored_tensors(
            path, donor=donor, aliased=self.aliased, by_rows=self.by_rows, coded=self.coded
        )

    def aliased(self, name: str) -> bool:
        may_alias = self._tables or name not in TABLES
        return may_alias and not self.by_rows(name) and self._draw(name).random() < self._share

    def by_rows(self, name: str) -> bool:
        return name in TABLES and self._draw(name).random() < 0.3

    def coded(self, name: str) -> Residual | None:
        draw = self._draw(f"rung {name}")
        if draw.random() > self._coded:
            return None
        rung = parse_rung(draw.choice(RESIDUALS))
        assert isinstance(rung, Residual)
        return rung

    def _draw(self, name: str) -> random.Random:
        return random.Random(f"{self._drawn} {name}")


def choose_activation(path: Path, chance: random.Random) -> None:
    """Lets a checkpoint's MLPs have any gate that its architecture is known with."""
    config = json.loads((path / "config.json").read_text())
    key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    config[key] = chance.choice(["silu", "gelu", "gelu_pytorch_tanh", "relu"])
    (path / "config.json").write_text(json.dumps(config))


def random_family(
    tmp_path: Path, architecture: str, arithmetic: Arithmetic, chance: random.Random
) -> Family:
    """A donor, a variant with added tokens, two more, a stranger of another type, an alias.

    The last has the donor's blocks between ends of its own.
    """
    tie = chance.random() < 0.5
    base = make_checkpoint(tmp_path / "base", architecture=architecture, tie=tie, vocab_size=VOCAB)
    choose_activation(base, chance)
    family = build_family(base, num_pages=256, arithmetic=arithmetic)
    for number in (1, 2, 3):
        added = ("<a>", "<b>") if number == 1 else ()
        path = make_variant(
            tmp_path / f"v{number}",
            base,
            scale=0.3,
            seed=number,
            added_tokens=added,
        )
        plan = RandomPlan(chance, tables=not added)  # more tokens are no alias
        family.add(plan.stored(path, family.stored[0]))
    dtype = chance.choice(["float16", "float32"])
    stranger = make_checkpoint(
        tmp_path / "stranger",
        architecture=architecture,
        tie=tie,
        vocab_size=VOCAB,
        dtype=dtype,
        seed=9,
    )
    plan = RandomPlan(chance)
    lent = family.stored[0]
    family.add(stored_tensors(stranger, donor=lent, aliased=plan.aliased, coded=plan.coded))
    near = make_variant(tmp_path / "near", base, scale=0.3, seed=8)
    family.add(stored_tensors(near, donor=family.stored[0], aliased=lambda name: "layers" in name))
    return family


def random_sequences(chance: random.Random) -> list[Sequence]:
    sequences = []
    for slot in chance.choices(range(6), k=7):
        length = chance.randint(1, MAX_TOKENS)
        width = VOCAB + ADDED if slot == 1 else VOCAB
        tokens = [chance.randrange(width) for _ in range(length)]
        sequences.append(Sequence(slot, tokens, PageTable()))
    return sequences


def compute_alone(family: Family, sequences: list[Sequence]) -> list[torch.Tensor]:
    """The logits of each sequence, computed whole and with nothing beside it."""
    batches = Batches(family)
    for sequence in sequences:
        assert batches.step([(sequence, len(sequence.tokens))]) == [True]
        batches.release([sequence])
    return [batches.rows[id(sequence)] for sequence in sequences]


def compute_mixed(
    family: Family, sequences: list[Sequence], chance: random.Random
) -> list[torch.Tensor]:
    """The same from random chunks in random batches, ended by decoding side by side."""
    batches = Batches(family)
    decoded = {id(sequence): min(len(sequence.tokens), 5) - 1 for sequence in sequences}
    while waiting := [s for s in sequences if s.left > decoded[id(s)]]:
        chosen = chance.sample(waiting, chance.randint(1, len(waiting)))
        most = [s.left - decoded[id(s)] for s in chosen]
        lengths = [chance.choice([1, m, chance.randint(1, m)]) for m in most]
        assert all(batches.step(list(zip(chosen, lengths, strict=True))))
    while going := [(sequence, 1) for sequence in sequences if sequence.left]:
        assert all(batches.step(going))
    found = [batches.rows[id(sequence)] for sequence in sequences]
    batches.release(sequences)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ARITHMETICS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_sequence_gets_the_logits_that_it_has_alone(
    tmp_path: Path, architecture: str, kind: type[Arithmetic], seed: int
) -> None:
    chance = random.Random(f"{architecture} {seed}")
    family = random_family(tmp_path, architecture, kind(), chance)
    sequences = random_sequences(chance)
    alone = compute_alone(family, sequences)
    for _ in range(3):
        chance.shuffle(order := list(range(len(sequences))))
        mixed = compute_mixed(family, [sequences[n] for n in order], chance)
        for number, got_TV in zip(order, mixed, strict=True):
            if kind is CompiledArithmetic:
                assert torch.equal(got_TV, alone[number])
            else:
                assert relative_error(got_TV, alone[number]) <= PLAIN_TOLERANCE
    family.cache.check_integrity()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ARITHMETICS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_sequence_gets_the_logits_of_its_dequantised_variant(
    tmp_path: Path, architecture: str, kind: type[Arithmetic], seed: int
) -> None:
    """Transformers in float32 over what each variant's storages stand for is the judge."""
    chance = random.Random(f"{architecture} {seed} dequantised")
    family = random_family(tmp_path, architecture, kind(), chance)
    assert any(isinstance(e, StoredResidual) for s in family.stored for e in s.values())
    sequences = random_sequences(chance)
    mixed = compute_mixed(family, sequences, chance)
    for sequence, got_TV in zip(sequences, mixed, strict=True):
        path = tmp_path / ("v1" if sequence.slot == 1 else "base")  # for its vocabulary's width
        model = reference_model(path, stored=family.stored[sequence.slot])
        want_TV = reference_logits(model, sequence.tokens)
        assert relative_error(got_TV, want_TV) <= PLAIN_TOLERANCE


def test_step_of_one_variant_is_not_replayed_for_another_that_has_its_own_deltas(
    tmp_path: Path,
) -> None:
    """Their storages are the same but for the deltas, and so is the shape of their steps."""
    base = make_checkpoint(tmp_path / "base", architecture="llama", vocab_size=VOCAB)
    family = build_family(base)
    for seed in (1, 2):
        path = make_variant(tmp_path / f"v{seed}", base, scale=0.3, seed=seed)
        family.add(
            stored_tensors(
                path,
                donor=family.stored[0],
                aliased=lambda name: "norm" in name,
                coded=lambda _: Residual(bits=4, group=32),
            )
        )
    tokens = [5, 7, 11, 7, 2, 9, 30]
    for slot in (1, 2, 0, 2):
        sequence, batches = Sequence(slot, tokens, PageTable()), Batches(family)
        for _ in tokens:
            assert batches.step([(sequence, 1)]) == [True]
        want_TV = reference_logits(reference_model(base, stored=family.stored[slot]), tokens)
        assert relative_error(batches.rows[id(sequence)], want_TV) <= PLAIN_TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_and_plain_arithmetic_give_the_same_logits(
    tmp_path: Path, architecture: str
) -> None:
    found = []
    for kind in ARITHMETICS:
        chance = random.Random(architecture)
        family = random_family(tmp_path / kind.__name__, architecture, kind(), chance)
        found.append(compute_alone(family, random_sequences(chance)))
    for compiled_TV, plain_TV in zip(*found, strict=True):
        assert relative_error(compiled_TV, plain_TV) <= PLAIN_TOLERANCE


@pytest.fixture
def always_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets threads share what is too small to be worth it."""
    for name in ("_MIN_SHARED_PRODUCT", "_MIN_SHARED_ELEMENTS", "_MIN_SHARED_SEEN"):
        monkeypatch.setattr(compiled_module, name, 0)


@pytest.mark.usefixtures("always_shared")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequence_is_the_same_on_one_thread_and_on_several(
    tmp_path: Path, architecture: str
) -> None:
    chance = random.Random(architecture)
    family = random_family(tmp_path, architecture, CompiledArithmetic(), chance)
    sequences = random_sequences(chance)
    found = []
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compute_alone(family, sequences))
            found.append(compute_mixed(family, sequences, chance))
    finally:
        torch.set_num_threads(num_threads)
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))


@pytest.mark.parametrize("where", ["embedding", "block", "norm"])
@pytest.mark.parametrize("kind", ARITHMETICS)
def test_weight_that_is_not_a_number_marks_its_own_variant_only(
    tmp_path: Path, kind: type[Arithmetic], where: str
) -> None:
    base = make_checkpoint(tmp_path / "base", vocab_size=VOCAB)
    path = make_variant(tmp_path / "v", base, scale=0.3)
    name = {
        "embedding": EMBED_NAME,
        "block": "model.layers.1.mlp.down_proj.weight",
        "norm": "model.layers.0.input_layernorm.weight",
    }[where]
    results: list[list[torch.Tensor]] = []
    for broken in (False, True):
        family = build_family(base, arithmetic=kind())
        own = stored_tensors(path, donor=family.stored[0], aliased=lambda other: other != name)
        if broken:
            own[name].base.tensor[7] = float("nan")
        family.add(own)
        good = [Sequence(0, [5, 7, 11, 7], PageTable()), Sequence(0, [9, 7], PageTable())]
        bad = Sequence(1, [7, 7, 8, 9], PageTable())
        batches = Batches(family)
        assert batches.step([(good[0], 3), (bad, 3), (good[1], 1)]) == [True, not broken, True]
        assert batches.step([(good[0], 1), (bad, 1), (good[1], 1)]) == [True, not broken, True]
        results.append([batches.rows[id(sequence)] for sequence in good])
    for whole, beside in zip(*results, strict=True):
        assert torch.equal(whole, beside)


def test_finite_is_false_for_the_chunk_with_the_bad_row_alone(tmp_path: Path) -> None:
    """One token's row of the embedding is infinite: sequences without it are computed."""
    base = make_checkpoint(tmp_path / "base", vocab_size=VOCAB)
    family = build_family(base, arithmetic=TorchArithmetic())
    family.stored[0][EMBED_NAME].base.tensor[7, 3] = float("inf")
    sequences = [Sequence(0, tokens, PageTable()) for tokens in ([5, 6, 8], [5, 7, 8], [9], [7])]
    batches = Batches(family)
    finite = batches.step([(sequence, len(sequence.tokens)) for sequence in sequences])
    assert finite == [True, False, True, False]
