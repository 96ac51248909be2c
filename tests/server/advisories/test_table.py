"""docs/security.md lists the advisories that are replayed: all of them, and no others."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
PROJECT = HERE.parents[2]
DOCUMENT = PROJECT / "docs" / "security.md"
_ROW = re.compile(r"\| ([A-F0-9, ]+) \| (\S+) \| (.+) \| `(test_\w+\.py)::(test_\w+)` \|")
_NAMED = re.compile(r"(?:cve_\d{4}_\d+|ghsa(?:_\w{4}){3}|pysec_\d{4}_\d+|go_\d{4}_\d+|issue_\d+)")


class Row(NamedTuple):
    advisory: str
    file: str
    function: str


def plain(name: str) -> str:
    """Returns a name as those of tests have it."""
    return re.sub(r"[^a-z0-9]+", "_", name.replace("#", " issue ").lower())


def rows() -> list[Row]:
    lines = DOCUMENT.read_text().partition("| row | advisory |")[2].splitlines()[2:]
    found = []
    for line in lines:
        match = _ROW.fullmatch(line)
        assert match is not None, line
        found.append(Row(match[2], match[4], match[5]))
    return found


@pytest.fixture(scope="module")
def tests() -> dict[tuple[str, str], list[str]]:
    """The tests of this package as pytest collects them: file and function -> their whole names."""
    command = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    done = subprocess.run(
        (*command, str(HERE)), capture_output=True, text=True, cwd=PROJECT, check=True
    )
    found: dict[tuple[str, str], list[str]] = {}
    for line in done.stdout.splitlines():
        path, separator, name = line.partition("::")
        if separator:
            key = (Path(path).name, name.partition("[")[0])
            found.setdefault(key, []).append(plain(name))
    return found


def test_every_row_has_its_test(tests: dict[tuple[str, str], list[str]]) -> None:
    for row in rows():
        names = tests.get((row.file, row.function), [])
        assert any(f"{plain(row.advisory)}_" in f"{name}_" for name in names), row


def test_every_test_that_is_named_after_an_advisory_has_its_row(
    tests: dict[tuple[str, str], list[str]],
) -> None:
    listed = {plain(row.advisory) for row in rows()}
    for names in tests.values():
        for name in names:
            for advisory in _NAMED.findall(name):
                assert any(known.endswith(advisory) for known in listed), name


def numbers() -> Iterator[int]:
    text = " ".join(DOCUMENT.read_text().split())
    for number in re.findall(r"(\d+)(?= advisories| of them)", text):
        yield int(number)


def test_advisories_are_counted_and_many() -> None:
    advisories = [row.advisory for row in rows()]
    assert len(set(advisories)) == len(advisories) >= 60
    assert set(numbers()) == {len(advisories)}
