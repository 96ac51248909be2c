"""Gates against their formulas in float64."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from llvmlite import ir

from linker_core.engine.cpu.gate_code import TASK, emit_gate
from linker_core.engine.cpu.regions import Code
from tests.linker_core.engine.cpu.compiled import compiled, record, run

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@cache
def _code(activation: str, lanes: int) -> Code:
    def emit(module: ir.Module) -> None:
        emit_gate(module, activation=activation, lanes=lanes)

    return compiled(emit)


def _gate(
    gate_TI: torch.Tensor,
    up_TI: torch.Tensor,
    activation: str,
    *,
    lanes: int = 16,
    num_threads: int = 1,
) -> None:
    num_rows, width = gate_TI.shape
    task = record(
        TASK,
        gate=gate_TI.data_ptr(),
        gate_stride=gate_TI.stride(0),
        up=up_TI.data_ptr(),
        up_stride=up_TI.stride(0),
        num_rows=num_rows,
        width=width,
    )
    run(_code(activation, lanes), f"gate_{activation}", task, num_threads=num_threads)


def _opened(x_TI: torch.Tensor, activation: str) -> torch.Tensor:
    """Returns the activation in float64, from its definition."""
    x = x_TI.double()
    if activation == "silu":
        return x / (1 + (-x).exp())
    if activation == "gelu":
        share: torch.Tensor = torch.special.ndtr(x)
        return x * share
    if activation == "gelu_pytorch_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x.clamp_min(0)


def _both(num_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up as they lie side by side in one buffer, with room behind."""
    generator = torch.Generator().manual_seed(width)
    both = torch.randn(num_rows, 2 * width + 3, generator=generator) * 4
    return both[:, :width], both[:, width : 2 * width]


@pytest.mark.parametrize("width", [1, 5, 16, 80, 99, 1024, 1031, 2500])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_gate_of_any_width_is_the_formula(lanes: int, activation: str, width: int) -> None:
    gate_TI, up_TI = _both(3, width)
    want_TI = _opened(gate_TI, activation) * up_TI.double()
    up_before = up_TI.clone()
    base = gate_TI._base
    assert base is not None
    behind = base[:, 2 * width :].clone()
    _gate(gate_TI, up_TI, activation, lanes=lanes, num_threads=2)
    error = (gate_TI.double() - want_TI).abs()
    assert (error <= 1e-6 * want_TI.abs() + 2e-6 * up_TI.abs()).all()
    assert torch.equal(up_TI, up_before)
    assert torch.equal(base[:, 2 * width :], behind)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_from_the_smallest_to_the_largest_is_the_formula(activation: str) -> None:
    sizes = torch.logspace(-30, 1.2, 5000)
    gate_TI = torch.cat([sizes, -sizes]).view(4, -1)
    x_TI, want_TI = gate_TI.clone(), _opened(gate_TI, activation)
    _gate(gate_TI, torch.ones_like(gate_TI), activation)
    assert ((gate_TI.double() - want_TI).abs() <= 3e-7 * x_TI.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_the_same_in_every_batch_and_on_every_thread(
    num_threads: int, activation: str
) -> None:
    width = 1100
    gate_TI, up_TI = _both(7, width)
    alone = []
    for row in range(7):
        one, up = gate_TI[row : row + 1].clone(), up_TI[row : row + 1].clone()
        _gate(one, up, activation)
        alone.append(one)
    _gate(gate_TI, up_TI, activation, num_threads=num_threads)
    assert torch.equal(gate_TI, torch.cat(alone))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_stays_so_in_its_own_place(activation: str) -> None:
    for column in (3, 41):  # in a vector, and among what is left over
        gate_TI, up_TI = _both(2, 43)
        want_TI = gate_TI.clone()
        _gate(want_TI, up_TI, activation)
        gate_TI[1, column] = float("nan")
        _gate(gate_TI, up_TI, activation)
        assert gate_TI[1, column].isnan()
        gate_TI[1, column] = want_TI[1, column]
        assert torch.equal(gate_TI, want_TI)
