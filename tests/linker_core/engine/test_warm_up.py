"""Code that is new to a machine is compiled while a model is loaded, beside the steps of others."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llvmlite import ir

from linker_core.engine.arithmetic import Addend, Demand, Norm, codes_of
from linker_core.engine.cpu import kernels
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.cpu.regions import Code, compile_regions
from linker_core.engine.messages import CancelLoad, LoadFailed, ModelLoaded
from linker_core.engine.rows import RowGroup
from linker_core.errors import LinkerError
from tests.linker_core.engine.driving import GREEDY, Driver, load_message
from tests.linker_core.engine.residuals import residual
from tests.linker_core.engine.serving import PROMPT
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Forgets all code that this process has, and notes what it gets anew."""
    names: list[str] = []

    def noted(name: str, emit: Callable[[ir.Module], None]) -> Code:
        names.append(name)
        return compile_regions(name, emit)

    monkeypatch.setattr(kernels, "compile_regions", noted)
    for region in (
        *(kernels.product_region, kernels.norm_region, kernels.add_region, kernels.gate_region),
        *(kernels.coded_product_region, kernels.expand_region, kernels._attention),
    ):
        region.cache_clear()
    return names


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral", "gemma2"])
def test_no_step_has_to_wait_for_code(tmp_path: Path, architecture: str, asked: list[str]) -> None:
    path = make_checkpoint(tmp_path / "base", architecture=architecture, dtype="float16")
    driver = Driver()
    driver.load(load_message("base", path))
    ready = list(asked)
    assert {name.partition("-")[0].partition("_")[0] for name in ready} == {
        *("add", "gate", "norm", "attention", "product"),
    }
    driver.generate("base", PROMPT)
    assert asked == ready


def test_no_step_of_a_variant_in_another_type_has_to_wait(tmp_path: Path, asked: list[str]) -> None:
    base = make_checkpoint(tmp_path / "base", tie=False)
    variant = make_checkpoint(tmp_path / "variant", tie=False, dtype="float32")
    driver = Driver()
    driver.load(load_message("base", base))
    before = len(asked)
    assert not any("F32" in name for name in asked)
    driver.load(load_message("variant", variant, donor="base"))
    ready = list(asked)
    assert any("F32" in name for name in ready[before:])
    for model in ("base", "variant"):
        driver.generate(model, PROMPT)
    assert asked == ready


@pytest.mark.parametrize(
    "text", ["int4:64", "int3:32", "rank3:8", "rank2:16+signs:32", "rank5:4+int3:128"]
)
def test_no_step_over_deltas_has_to_wait(asked: list[str], text: str) -> None:
    delta = residual(text, 20, 40)
    arithmetic = CompiledArithmetic()
    arithmetic.warm_up(
        Demand(
            weights=frozenset(),
            norm_weights=frozenset(),
            norm=Norm(1e-6, plus_one=False),
            activation="silu",
            attention=frozenset(),
            page_tokens=16,
            codes=codes_of(delta),
        )
    )
    ready = list(asked)
    assert any(name.startswith("coded-") for name in ready)
    assert not any(name.startswith(("expand-1-", "expand-2-", "expand-3-")) for name in ready)
    rows = RowGroup(torch.tensor([0, 1]), slice(0, 2))
    arithmetic.add_residuals(torch.ones(2, 40), [Addend(delta, rows, torch.ones(2, 20))])
    assert asked == ready


def test_streams_go_on_while_code_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base")
    driver = Driver()
    driver.load(load_message("base", base))
    started, compiled = threading.Event(), threading.Event()

    def slow(_self: CompiledArithmetic, _demand: Demand) -> None:
        started.set()
        assert compiled.wait(60)

    monkeypatch.setattr(CompiledArithmetic, "warm_up", slow)
    driver.engine.handle(load_message("other", base))
    while not started.is_set():
        driver.step()
    stream = driver.submit("base", PROMPT)
    for _ in range(GREEDY.max_tokens + 1):
        driver.step()
    assert len(driver.tokens(stream)) == GREEDY.max_tokens
    assert "other" not in driver.engine.residents.served
    compiled.set()
    driver.run()
    assert "other" in driver.engine.residents.served


def test_load_whose_code_cannot_be_compiled_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base")
    variant = make_variant(tmp_path / "variant", base, scale=0.2)
    driver = Driver()
    driver.load(load_message("base", base))
    free = driver.engine.residents.pool.budget.free_bytes()

    def refuse(_self: CompiledArithmetic, _demand: Demand) -> None:
        raise LinkerError("no such code")

    with monkeypatch.context() as patched:
        patched.setattr(CompiledArithmetic, "warm_up", refuse)
        answer = driver.load(load_message("variant", variant, donor="base"))
    assert isinstance(answer, LoadFailed)
    assert answer.error["message"] == "no such code"
    assert driver.engine.residents.pool.budget.free_bytes() == free
    assert isinstance(driver.load(load_message("variant", variant, donor="base")), ModelLoaded)


def test_load_cancelled_while_code_is_compiled_keeps_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base")
    driver = Driver()
    residents = driver.engine.residents
    started, compiled = threading.Event(), threading.Event()

    def slow(_self: CompiledArithmetic, _demand: Demand) -> None:
        started.set()
        assert compiled.wait(60)

    monkeypatch.setattr(CompiledArithmetic, "warm_up", slow)
    driver.engine.handle(load_message("base", base))
    while not started.is_set():
        driver.step()
    stored = residents.pool.get("base").tensors.values()
    held: list[weakref.ref[object]] = [weakref.ref(residents.families["base"])]
    held += [weakref.ref(tensor) for entry in stored for tensor in entry.tensors]
    del stored
    driver.engine.handle(CancelLoad(model="base"))
    driver.run()
    gc.collect()
    alive = [ref for ref in held if ref() is not None]
    compiled.set()
    assert alive == []
    assert residents.pool.ledger.resident_bytes() == residents.pool.budget.kv_bytes() == 0
