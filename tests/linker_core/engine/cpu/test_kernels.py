"""Which code is compiled for a model and a processor."""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from linker_core.engine.cpu import kernels
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.cpu.regions import Code, compile_regions
from linker_core.errors import LinkerError
from tests.linker_core.engine.attending import Attending, shape_of


def test_layers_with_and_without_a_window_share_their_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []

    def noted(name: str, emit: Callable[[ir.Module], None]) -> Code:
        compiled.append(name)
        return compile_regions(name, emit)

    monkeypatch.setattr(kernels, "compile_regions", noted)
    kernels._attention.cache_clear()
    for window in (None, 9, 5):
        attending = Attending(CompiledArithmetic(), shape_of(window=window))
        attending.step([(attending.sequence(3, seed=1), 3)])
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("features", "lanes"),
    [(("avx2", "fma", "avx512f"), 16), (("avx2", "fma"), 8), (("neon",), 4), (("avx",), None)],
)
def test_vectors_are_those_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], lanes: int | None
) -> None:
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: dict.fromkeys(features, True))
    kernels.host_tiling.cache_clear()
    try:
        if lanes is None:
            with pytest.raises(LinkerError, match="neither AVX2 with FMA nor NEON"):
                CompiledArithmetic()
        else:
            assert kernels.host_tiling().lanes == lanes
    finally:
        kernels.host_tiling.cache_clear()
