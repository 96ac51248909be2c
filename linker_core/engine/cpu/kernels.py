"""The regions of this CPU: each compiled when it is first asked for, and found again from then on.

Types of words are named as safetensors names them.
"""

from __future__ import annotations

from functools import cache, partial

import llvmlite.binding as llvm

from linker_core.engine.arithmetic import AttentionShape, Code
from linker_core.engine.cpu.add_code import emit_add
from linker_core.engine.cpu.attention_code import emit_attention
from linker_core.engine.cpu.attention_spec import AttentionSpec
from linker_core.engine.cpu.coded_product_code import emit_coded_product
from linker_core.engine.cpu.coded_steps import PairSteps
from linker_core.engine.cpu.decoding import Lookup
from linker_core.engine.cpu.dot_product import DotProduct, Rounded, Widened
from linker_core.engine.cpu.expand_code import emit_expand
from linker_core.engine.cpu.gate_code import emit_gate
from linker_core.engine.cpu.norm_code import NormSpec, emit_norm
from linker_core.engine.cpu.product_code import Tiling, emit_product
from linker_core.engine.cpu.regions import Region, compile_regions
from linker_core.errors import LinkerError


@cache
def host_tiling() -> Tiling:
    """Returns how this CPU's vectors are used.

    Raises:
        LinkerError: It has none that multiply and add at once; in C's library that takes an age.
    """
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return Tiling(lanes=16, num_registers=32, panel_rows=6)
    if features.get("avx2") and features.get("fma"):
        return Tiling(lanes=8, num_registers=16, panel_rows=4)
    if features.get("neon"):
        return Tiling(lanes=4, num_registers=32, panel_rows=4)
    raise LinkerError(
        f"The CPU ({llvm.get_host_cpu_name()}) has neither AVX2 with FMA nor NEON, which the "
        "engine's kernels need. In a virtual machine, give it the host's CPU model."
    )


def can_round() -> bool:
    """Whether this CPU multiplies pairs of bfloat16."""
    return bool(llvm.get_host_cpu_features().get("avx512bf16"))


@cache
def product_region(dtype: str, rounded: bool) -> Region:
    """Returns the products with weights of a type; `rounded` counts where the CPU can round."""
    tiling = host_tiling()
    dot: DotProduct = Widened(dtype, tiling.lanes)
    if rounded and dtype == "BF16" and can_round():
        dot = Rounded()
    name = f"product-{dtype}-{type(dot).__name__.lower()}-{tiling.lanes}"
    emit = partial(emit_product, dot=dot, dtype=dtype, tiling=tiling)
    return Region(compile_regions(name, emit), "product")


@cache
def norm_region(dtype: str, plus_one: bool) -> Region:
    """Returns the norm with weights of a type, by w or by 1 + w."""
    spec = NormSpec(dtype=dtype, plus_one=plus_one, lanes=host_tiling().lanes)
    emit = partial(emit_norm, spec=spec)
    return Region(compile_regions(f"{spec.symbol}-{spec.lanes}", emit), spec.symbol)


@cache
def add_region() -> Region:
    """Returns the sum of rows."""
    lanes = host_tiling().lanes
    return Region(compile_regions(f"add-{lanes}", partial(emit_add, lanes=lanes)), "add")


@cache
def gate_region(activation: str) -> Region:
    """Returns the gate of an activation, as transformers names it."""
    lanes = host_tiling().lanes
    emit = partial(emit_gate, activation=activation, lanes=lanes)
    return Region(compile_regions(f"gate-{activation}-{lanes}", emit), f"gate_{activation}")


@cache
def coded_product_region(code: Code, rounded: bool) -> Region:
    """Returns the products with matrices of a code; `rounded` counts where the CPU can round."""
    lookup = _host_lookup()
    steps = None
    name = f"coded-{code.bits}-{code.group}-{lookup}"
    if code.group and can_round():
        steps = PairSteps(code.bits, code.group, rounded=rounded)
        name += "-rounded" if rounded else "-pairs"
    emit = partial(emit_coded_product, code=code, lookup=lookup, steps=steps)
    return Region(compile_regions(name, emit), "coded_product")


@cache
def expand_region(code: Code) -> Region:
    """Returns the sums of rows of a code."""
    lookup = _host_lookup()
    name = f"expand-{code.bits}-{code.group}-{lookup}"
    emit = partial(emit_expand, code=code, lookup=lookup)
    return Region(compile_regions(name, emit), "expand")


def _host_lookup() -> Lookup:
    lanes = host_tiling().lanes
    return {16: Lookup.AVX512, 8: Lookup.AVX2}.get(lanes, Lookup.MEMORY)


def attention_region(shape: AttentionShape, page_tokens: int) -> Region:
    """Returns the attention of a layer: the same for layers with and without a window."""
    tiling = host_tiling()
    return _attention(
        AttentionSpec(
            head_dim=shape.head_dim,
            group=shape.num_heads // shape.num_kv_heads,
            page_tokens=page_tokens,
            lanes=tiling.lanes,
            num_registers=tiling.num_registers,
            softcap=shape.softcap,
        )
    )


@cache
def _attention(spec: AttentionSpec) -> Region:
    emit = partial(emit_attention, spec=spec)
    return Region(compile_regions(f"{spec.symbol}-{spec.lanes}", emit), spec.symbol)
