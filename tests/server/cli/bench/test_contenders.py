from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import LinkerError
from server.cli.bench import process_tree
from server.cli.bench.contenders import Launch, running, streams_of

_CHANNEL = "server.cli.bench.runners.channel"
_RUNNER = "tests.server.cli.bench.fake_runner"


def _launch(**settings: Any) -> Launch:
    command = (sys.executable, "-m", _CHANNEL, _RUNNER, json.dumps(settings))
    return Launch(name="fake", command=command)


def test_contender_runs_only_while_it_is_its_turn() -> None:
    with running([_launch()]) as (contender,):
        assert process_tree.state_of(contender.pid) == "T"
        with contender.awake():
            assert process_tree.state_of(contender.pid) != "T"
            found = contender.run(streams_of(3, prompt_tokens=8, seed=1), max_tokens=5)
        assert process_tree.state_of(contender.pid) == "T"
    assert process_tree.state_of(contender.pid) is None
    assert found.num_tokens == 15
    assert [len(stream) for stream in found.streams] == [5, 5, 5]
    assert 1 << 20 < contender.peak.anonymous_bytes <= contender.peak.pss_bytes


def test_engine_that_ends_while_it_loads_is_told_of_with_its_last_words() -> None:
    with (
        pytest.raises(LinkerError, match=r"(?s)fake ended\. .*no such weights"),
        running([_launch(fail="load")]),
    ):
        pass


def test_engine_that_ends_in_a_round_is_told_of_with_its_last_words() -> None:
    with (
        pytest.raises(LinkerError, match="out of memory"),
        running([_launch(fail="round")]) as (contender,),
        contender.awake(),
    ):
        contender.run(streams_of(1, prompt_tokens=8, seed=1), max_tokens=64)


def test_answers_of_another_length_are_not_compared() -> None:
    with (
        pytest.raises(LinkerError, match="gave 7 tokens instead of 8"),
        running([_launch(missing=1)]) as (contender,),
        contender.awake(),
    ):
        contender.run(streams_of(1, prompt_tokens=8, seed=1), max_tokens=8)


def test_streams_have_prompts_of_their_own_over_models_in_turn() -> None:
    streams = streams_of(4, prompt_tokens=32, seed=1, models=(0, 7))
    assert [stream.model for stream in streams] == [0, 7, 0, 7]
    assert len({tuple(stream.prompt_ids) for stream in streams}) == 4
    assert all(len(stream.prompt_ids) == 32 for stream in streams)
    assert streams == streams_of(4, prompt_tokens=32, seed=1, models=(0, 7))
    assert streams != streams_of(4, prompt_tokens=32, seed=2, models=(0, 7))


def test_a_peer_gets_no_setting_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("KEPT", "yes")
    launch = Launch(name="x", command=("x",), environment={"A": "b c"}, programs=Path("/p"))
    found = launch.full_environment()
    assert "OMP_WAIT_POLICY" not in found
    assert (found["KEPT"], found["A"]) == ("yes", "b c")
    assert found["PATH"] == f"/p:{os.environ['PATH']}"
    ours = Launch(name="x", command=("x",), ours=True)
    assert ours.full_environment()["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_launch_reads_as_one_would_type_it() -> None:
    launch = Launch(
        name="x",
        command=("printf", "%s-%s", "$HOME"),
        environment={"A": "b c"},
        programs=Path("/p"),
    )
    assert str(launch) == "A='b c' PATH=/p:$PATH printf %s-%s '$HOME'"
    assert subprocess.check_output(str(launch), shell=True, text=True) == "$HOME-"
