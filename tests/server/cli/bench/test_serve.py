from __future__ import annotations

from pathlib import Path

import pytest

from linker_core.errors import LinkerError
from server.cli.bench.contenders import Launch
from server.cli.bench.scenario import Settings
from server.cli.bench.serve import measure_single, measure_variants
from server.cli.bench.servers import ServerLaunch, serving
from tests.server.cli.bench.small import SHAPE


@pytest.fixture
def alone(tmp_path: Path) -> Settings:
    return Settings(models=tmp_path, peers=None, rounds=1, tokens=8, shape=SHAPE)


def test_single_measures_streams_of_a_server_as_users_start_it(alone: Settings) -> None:
    found = measure_single(alone)["runs"]["alone"]
    assert found["figures"]["linker"]["tokens_per_s"] > 0
    assert "serve --strict" in found["commands"]["linker"]
    assert found["memory"]["linker"]["pss_mib"] > found["memory"]["linker"]["anonymous_mib"] > 1


def test_variants_are_measured_beside_one_variant(alone: Settings) -> None:
    found = measure_variants(alone)
    one, four = (found["figures"][n]["tokens_per_s"] for n in ("one variant", "four variants"))
    assert found["ratio"] == pytest.approx(four / one)
    assert found["peers"] == {}


def test_server_that_ends_at_once_is_told_of_with_its_last_words() -> None:
    launch = Launch(name="brief", command=("sh", "-c", "echo no such flag >&2; exit 2"))
    kind = ServerLaunch(launch=launch, models=("m",), ready="/health")
    with pytest.raises(LinkerError, match=r"brief is not ready\. no such flag"), serving(kind):
        pass
