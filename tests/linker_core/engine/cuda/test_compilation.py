"""Triton compiles the kernels for devices that are not here: its interpreter accepts more than it.

Only what is compiled is looked at, not what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the extra 'kernels' is not installed")

ROWS = {"x_TX": "*T", "x_stride": "i32", "out_TX": "*T", "out_stride": "i32"}
FUSED = {"qkv_TX": "*T", "qkv_stride": "i32", "keys_NKDP": "*T", "values_NKPD": "*T"}
PARTS = {"part_THSD": "*fp32", "sums_THS2": "*fp32"}
SHAPE = {"NUM_KV_HEADS": 4, "HEAD_DIM": 128, "PAGE_TOKENS": 16}
TILES = {"GROUP": 7, "BLOCK_N": 64, "BLOCK_D": 128, "WINDOW": 0, "SOFTCAP": 0.0}
WIDE = {"BLOCK_M": 64, "NUM_PARTS": 1, "GROUP": 2, "HEAD_DIM": 256, "BLOCK_D": 256} | {
    "BLOCK_N": 32, "WINDOW": 4096, "SOFTCAP": 50.0,
}  # fmt: skip
NORM = {"WIDTH": 3584, "BLOCK": 4096, "WEIGHT_TYPE": triton.language.bfloat16}
SMALLEST_SHARED_BYTES = 99 * 1024  # of a block on the devices of compute capability 8.6 and 8.9


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # without a word about its default


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def capability(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


def compile_for(
    capability: int,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    num_warps: int = 4,
) -> None:
    """Compiles a kernel for bfloat16 rows to machine code that a device can load."""
    signature = {
        name: types.get(name, "constexpr").replace("*T", "*bf16") for name in kernel.arg_names
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constexprs=values),
        target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": 2},
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SMALLEST_SHARED_BYTES


@pytest.mark.parametrize(
    "changes",
    [
        {"BLOCK_M": 64, "NUM_PARTS": 1},
        {"BLOCK_M": 16, "NUM_PARTS": 8, "GROUP": 4, "WINDOW": 4096},
        WIDE,
    ],
    ids=["prompts", "parts", "wide"],
)
def test_attention_of_items_compiles(capability: int, changes: dict[str, object]) -> None:
    from linker_core.engine.cuda.attention_kernels import attend_items  # noqa: PLC0415

    tables = {"items_J4": "*i32", "pages_N": "*i32", "scaling": "fp32"}
    types = {**FUSED, **tables, **PARTS, "out_TX": "*T", "out_stride": "i32"}
    num_warps = 8 if "HEAD_DIM" in changes else 4
    constants = {**SHAPE, **TILES, **changes}
    compile_for(capability, attend_items, types, constants, num_warps=num_warps)


def test_rotation_and_joining_compile(capability: int) -> None:
    from linker_core.engine.cuda.attention_kernels import join_parts, rotate_rows  # noqa: PLC0415

    types = {**FUSED, "cos_TD": "*fp32", "sin_TD": "*fp32", "targets_T": "*i32"}
    constants = {**SHAPE, "NUM_HEADS": 28, "BLOCK_HALF": 64}
    compile_for(capability, rotate_rows, types, constants, num_warps=1)
    types = {**PARTS, "out_TX": "*T", "out_stride": "i32"}
    constants = {"HEAD_DIM": 128, "BLOCK_D": 128, "NUM_PARTS": 8}
    compile_for(capability, join_parts, types, constants)


def test_norms_compile(capability: int) -> None:
    from linker_core.engine.cuda.row_kernels import normalize_runs  # noqa: PLC0415

    types = {**ROWS, "weights": "*bf16", "eps": "fp32"}
    constants = {**NORM, "labels_T": None, "PLUS_ONE": False, "BY_ROW": False}
    compile_for(capability, normalize_runs, types, constants, num_warps=8)
    types = {**types, "weights": "*i64", "labels_T": "*i64"}
    constants = {**NORM, "PLUS_ONE": True, "BY_ROW": True}
    compile_for(capability, normalize_runs, types, constants, num_warps=8)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gates_compile(capability: int, activation: str) -> None:
    from linker_core.engine.cuda.row_kernels import gate_rows  # noqa: PLC0415

    types = {"gate_TI": "*T", "gate_stride": "i32", "up_TI": "*T", "up_stride": "i32"}
    constants = {"ACTIVATION": activation, "BLOCK": 1024}
    compile_for(capability, gate_rows, {**types, "width": "i32"}, constants)


@pytest.mark.parametrize(("bits", "group"), [(1, 32), (2, 64), (3, 128), (4, 64), (8, 0), (16, 0)])
def test_residuals_compile(capability: int, bits: int, group: int) -> None:
    from linker_core.engine.cuda.residual_kernels import (  # noqa: PLC0415
        expand_coded,
        multiply_coded,
    )

    code_type = triton.language.bfloat16 if bits == 16 else triton.language.uint8
    constants = {"BITS": bits, "GROUP": group, "CODE_TYPE": code_type}
    constants["SCALE_TYPE"] = triton.language.bfloat16
    types = {"y_base": "*T", "rows": "*i64", "jobs_J9": "*i64", "levels": "*fp32"}
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "ADDS": True}
    rows = {"x_TI": "*T", "x_stride": "i32", "width": "i32"}
    compile_for(capability, multiply_coded, {**types, **rows}, {**constants, **tile})
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
    rows = {"t_TR": "*fp32", "t_stride": "i32"}
    compile_for(capability, expand_coded, {**types, **rows}, {**constants, **tile})
