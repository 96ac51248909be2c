"""A variant in another float type, or of another vocabulary, from its scan to its logits.

The judge is transformers in float32, over the checkpoint's own words or over what is stored.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linker_core.engine.devices import arithmetic_for
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.page_table import PageTable
from linker_core.engine.runner import Chunk, Runner
from linker_core.residency.pool import Pool
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_variant
from linker_core.sharing.rungs import Residual, Rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.engine.families import (
    Family,
    Storages,
    kv_shape,
    reference_logits,
    reference_model,
    relative_error,
)
from tests.linker_core.residency.deltas import DONOR, VARIANT, donor_plan, write_random_delta
from tests.linker_core.residency.test_pool import exhaust
from tests.linker_core.tuning.pairs import open_pair, random_text, response_log_probs
from tests.tiny import make_checkpoint, make_variant, retyped, save_state

CPU = torch.device("cpu")
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
MIXES = [(a, b) for a in SIZES for b in SIZES if a != b]
TOLERANCE = 1e-4
TOKENS = [3, 14, 159, 265, 35, 89, 79, 323, 84]
TABLES = (EMBED_NAME, LM_HEAD_NAME)
SCALE = {"model.layers.0.mlp.up_proj.weight": 0.9, "model.layers.1.self_attn.q_proj.weight": 0.01}


@pytest.fixture(params=MIXES, ids=["-".join(mix) for mix in MIXES])
def mix(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Folders `donor` and `variant` in two types, one block near its donor's and one far."""
    donor_type, variant_type = request.param
    base = make_checkpoint(tmp_path / "plain", tie=False)
    make_variant(tmp_path / "plain-variant", base, scale=SCALE)
    retyped(tmp_path / "donor", base, donor_type)
    retyped(tmp_path / "variant", tmp_path / "plain-variant", variant_type)
    return donor_type, variant_type


def planned(
    folder: Path, policy: Policy, *, tau_cos: float | None = None, tau_frob: float | None = None
) -> SharePlan:
    with Checkpoint.open(folder / "donor") as a, Checkpoint.open(folder / "variant") as b:
        return plan_variant(
            scan(a, b),
            a,
            b,
            policy=policy,
            fingerprints=Fingerprints(DONOR, VARIANT),
            tau_cos=tau_cos,
            tau_frob=tau_frob,
        )


def admitted(
    folder: Path, plan: SharePlan, opened: Callable[[Path], Checkpoint | DeltaFile], source: Path
) -> tuple[Pool, Family]:
    """Both models in a pool that counts as planned, behind one runner: slots 0 and 1."""
    pool = Pool(device=CPU)
    with Checkpoint.open(folder / "donor") as donor, opened(source) as variant:
        exhaust(pool.admit("base", donor, donor_plan(folder / "donor"), None))
        exhaust(pool.admit("chat", variant, plan, "base"))
        pool.check_integrity()
        cache = KVCache(kv_shape(donor.config), device=CPU)
        family = Family(Runner(donor.config, cache, arithmetic_for(CPU), device=CPU), cache)
    for name in ("base", "chat"):
        family.add(pool.get(name).tensors)
    assert pool.ledger.logical_bytes("chat") == plan.logical_bytes
    assert pool.ledger.unique_bytes("chat") == plan.unique_bytes
    return pool, family


def batch_logits(family: Family) -> list[torch.Tensor]:
    """The last logits of both models, computed in one batch."""
    chunks = []
    for slot in (0, 1):
        table = PageTable()
        assert family.cache.grow(table, len(TOKENS))
        chunks.append(Chunk(slot=slot, token_ids=TOKENS, start=0, table=table, num_logits=1))
    return list(family.runner.forward(chunks).logits_RV)


def expected(path: Path, stored: Storages | None = None) -> torch.Tensor:
    return reference_logits(reference_model(path, stored=stored), TOKENS)[-1]


def nbytes(path: Path) -> dict[str, int]:
    state = load_file(path / "model.safetensors")
    return {name: tensor.nbytes for name, tensor in state.items()}


def test_exact_variant_of_another_type_holds_its_own_words(
    tmp_path: Path, mix: tuple[str, str]
) -> None:
    """No word of it is the donor's, so nothing is shared and nothing changes."""
    plan = planned(tmp_path, Policy.EXACT)
    assert set(plan.rungs.values()) == {Rung.OWN}
    assert plan.unique_bytes == sum(nbytes(tmp_path / "variant").values())
    pool, family = admitted(tmp_path, plan, Checkpoint.open, tmp_path / "variant")
    for name, words in load_file(tmp_path / "variant" / "model.safetensors").items():
        (held,) = pool.get("chat").tensors[name].tensors
        assert torch.equal(held, words)
        assert held.dtype is getattr(torch, mix[1])
    for logits, name in zip(batch_logits(family), ("donor", "variant"), strict=True):
        assert relative_error(logits, expected(tmp_path / name)) <= TOLERANCE


def test_shared_blocks_are_the_donors_words_and_its_bytes(
    tmp_path: Path, mix: tuple[str, str]
) -> None:
    plan = planned(tmp_path, Policy.THRESHOLDS, tau_cos=0.99, tau_frob=0.05)
    donor_bytes, own_bytes = nbytes(tmp_path / "donor"), nbytes(tmp_path / "variant")
    aliased = {name for name, rung in plan.rungs.items() if rung is Rung.ALIAS}
    assert aliased == {name for name in own_bytes if name.startswith("model.layers.1.")}
    assert plan.unique_bytes == sum(own_bytes[name] for name in own_bytes.keys() - aliased)
    assert plan.logical_bytes == plan.unique_bytes + sum(donor_bytes[name] for name in aliased)
    assert plan.checkpoint_bytes == sum(own_bytes.values())
    assert sum(own_bytes.values()) * SIZES[mix[0]] == sum(donor_bytes.values()) * SIZES[mix[1]]
    pool, family = admitted(tmp_path, plan, Checkpoint.open, tmp_path / "variant")
    lent, held = pool.get("base").tensors, pool.get("chat").tensors
    assert all(held[name] is lent[name] for name in aliased)
    donor_logits, logits = batch_logits(family)
    assert relative_error(donor_logits, expected(tmp_path / "donor")) <= TOLERANCE
    assert relative_error(logits, expected(tmp_path / "variant", held)) <= TOLERANCE


def test_deltas_between_two_types_take_what_is_planned(
    tmp_path: Path, mix: tuple[str, str]
) -> None:
    chance = random.Random(str(mix))
    folders = (tmp_path / name for name in ("donor", "variant", "delta"))
    plan = write_random_delta(chance, *folders)
    assert any(isinstance(rung, Residual) for rung in plan.rungs.values())
    pool, family = admitted(tmp_path, plan, DeltaFile.open, tmp_path / "delta")
    held = pool.get("chat").tensors
    donor_logits, logits = batch_logits(family)
    assert relative_error(donor_logits, expected(tmp_path / "donor")) <= TOLERANCE
    assert relative_error(logits, expected(tmp_path / "variant", held)) <= TOLERANCE


@pytest.mark.usefixtures("mix")
def test_price_between_two_types_is_that_of_the_words_that_are_used(tmp_path: Path) -> None:
    pair = open_pair(tmp_path)
    text = random_text([40, 30])
    assert set(pair.base.values()) == {Rung.OWN}
    plan = pair.aliasing("layers.")
    own, aliased = pair.pricer(text).price([pair.base, plan])
    assert (own.kl, own.kl_upper, own.top1) == (0.0, 0.0, 1.0)
    log_p, log_q = (response_log_probs(pair.oracle(rungs), text) for rungs in (pair.base, plan))
    assert aliased.kl == pytest.approx(
        float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()), rel=1e-3
    )
    assert aliased.kl > 1e-3


@pytest.fixture(params=[480, 512, 514])
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> int:
    """Folders `donor` and `variant`; the latter has so many tokens, and ten rows of its own."""
    size: int = request.param
    donor = make_checkpoint(tmp_path / "donor", tie=False)
    added = [f"<|{number}|>" for number in range(size - 512)]
    rows = {name: range(10, 20) for name in TABLES}
    variant = make_variant(tmp_path / "variant", donor, scale=SCALE, added_tokens=added, rows=rows)
    if size < 512:
        state = load_file(variant / "model.safetensors")
        save_state(variant, {n: t[:size].clone() if n in TABLES else t for n, t in state.items()})
        record = json.loads((variant / "config.json").read_text())
        (variant / "config.json").write_text(json.dumps(record | {"vocab_size": size}))
    return size


def test_vocabulary_is_the_variants_own(tmp_path: Path, vocabulary: int) -> None:
    plan = planned(tmp_path, Policy.EXACT)
    extra = max(0, vocabulary - 512)
    assert {plan.rungs[name] for name in TABLES} == {Rung.ROWS}
    assert {plan.own_rows[name] for name in TABLES} == {10 + extra}
    pool, family = admitted(tmp_path, plan, Checkpoint.open, tmp_path / "variant")
    lent, held = pool.get("base").tensors, pool.get("chat").tensors
    assert sum(held[name] is lent[name] for name in plan.rungs) == len(plan.rungs) - 2 - len(SCALE)
    donor_logits, logits = batch_logits(family)
    assert relative_error(donor_logits[:512], expected(tmp_path / "donor")) <= TOLERANCE
    assert relative_error(logits[:vocabulary], expected(tmp_path / "variant")) <= TOLERANCE
    assert not logits[vocabulary:].any()


def test_deltas_of_another_vocabulary_take_what_is_planned(tmp_path: Path, vocabulary: int) -> None:
    chance = random.Random(vocabulary)
    folders = (tmp_path / name for name in ("donor", "variant", "delta"))
    plan = write_random_delta(chance, *folders)
    pool, family = admitted(tmp_path, plan, DeltaFile.open, tmp_path / "delta")
    held = pool.get("chat").tensors
    _, logits = batch_logits(family)
    assert relative_error(logits[:vocabulary], expected(tmp_path / "variant", held)) <= TOLERANCE


def test_price_of_another_vocabulary_is_over_the_variants_own_tokens(
    tmp_path: Path, vocabulary: int
) -> None:
    pair = open_pair(tmp_path)
    text, plan = random_text([40, 30], high=vocabulary), pair.aliasing("layers.")
    (price,) = pair.pricer(text).price([plan])
    log_p, log_q = (response_log_probs(pair.oracle(rungs), text) for rungs in (pair.base, plan))
    assert log_p.shape[-1] == vocabulary
    assert price.kl == pytest.approx(
        float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()), rel=1e-3
    )
