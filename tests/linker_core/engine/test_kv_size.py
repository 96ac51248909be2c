from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linker_core.config import EngineConfig
from linker_core.engine.family import kv_shape
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint


@pytest.mark.parametrize("tokens", [8, 100, 4096])
def test_predicted_bytes_are_those_of_the_cache(tmp_path: Path, tokens: int) -> None:
    with Checkpoint.open(make_checkpoint(tmp_path / "model")) as checkpoint:
        model = checkpoint.config
    cpu = EngineConfig(device="cpu", kv_cache_tokens=tokens)
    cuda = EngineConfig(device="cuda", kv_cache_tokens=tokens)
    for config, dtype in ((cpu, torch.float32), (cuda, torch.bfloat16)):
        cache = KVCache(kv_shape(model, config, dtype=dtype), device=torch.device("cpu"))
        held = cache.keys_LNKDP.nbytes + cache.values_LNKPD.nbytes
        assert kv_cache_bytes(model, config) == held
