"""`linker analyze`: the studies it knows, and how they are found."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys

import pytest

from server.cli.analyze import STUDIES, add_arguments
from server.cli.main import main


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_declares_its_arguments(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["analyze", study, "--help"])
    assert ended.value.code == 0
    assert f"linker analyze {study}" in capsys.readouterr().out


@pytest.mark.parametrize("study", STUDIES)
def test_the_example_of_a_study_is_one_that_it_takes(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["analyze", study, "--help"])
    _, example = capsys.readouterr().out.split("\nexample:\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for line in example.replace("\\\n", " ").strip().splitlines():
        program, command, *words = shlex.split(line.partition(">")[0])
        assert (program, command) == ("linker", "analyze")
        taken = parser.parse_args(words)
    assert taken.study == study


def test_an_unknown_study_is_refused_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["analyze", "pcb"])
    assert ended.value.code == 2
    assert "pca" in capsys.readouterr().err


def test_a_list_of_studies_imports_none_of_them() -> None:
    program = (
        "import sys; from server.cli.main import main\n"
        "try: main(['analyze', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'plotly', 'numpy'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("study", "given", "expected"),
    [("pca", None, "1"), ("report", None, "1"), ("pca", "4", "4"), ("kernel", None, None)],
)
def test_small_matrices_have_one_thread_unless_the_user_says_otherwise(
    study: str, given: str | None, expected: str | None
) -> None:
    script = (
        "import contextlib, os, sys\n"
        "from server.cli.main import main\n"
        "assert 'numpy' not in sys.modules\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    main(['analyze', {study!r}])\n"
        "assert 'numpy' in sys.modules\n"
        "print(os.environ.get('OPENBLAS_NUM_THREADS'))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    environment |= {} if given is None else {"OPENBLAS_NUM_THREADS": given}
    said = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=True,
    )
    assert said.stdout.split()[-1] == str(expected)
