from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linker_core.config import EngineConfig
from linker_core.engine.family import kv_shape
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint


@pytest.mark.parametrize("tokens", [8, 100, 4096])
def test_predicted_bytes_are_those_of_the_cache(tmp_path: Path, tokens: int) -> None:
    with Checkpoint.open(make_checkpoint(tmp_path / "model")) as checkpoint:
        model = checkpoint.config
    cpu = EngineConfig(kv_cache_tokens=tokens)
    assert kv_cache_bytes(model, cpu) == kv_shape(model, cpu, dtype=torch.float32).nbytes
    cuda = replace(cpu, device="cuda")
    assert kv_cache_bytes(model, cuda) == kv_shape(model, cuda, dtype=torch.bfloat16).nbytes
