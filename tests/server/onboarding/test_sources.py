from __future__ import annotations

from pathlib import Path

import pytest

from linker_core.errors import ForbiddenSourceError, InvalidRequestError
from server.onboarding.sources import resolve_source


def test_directory_inside_a_root_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert resolve_source(str(tmp_path / "a"), [tmp_path]) == tmp_path / "a"
    assert resolve_source("a", [tmp_path]) == tmp_path / "a"
    assert resolve_source(f"{tmp_path}/b/../a", [tmp_path]) == tmp_path / "a"


def test_root_that_is_a_link_counts_as_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert resolve_source(str(tmp_path / "real"), [tmp_path / "link"]) == tmp_path / "real"


def test_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "model").symlink_to("snapshot")
    assert resolve_source("model", [tmp_path]) == tmp_path / "snapshot"


@pytest.mark.parametrize("source", ["/etc", "..", "../x", "out", "out/passwd", "loop"])
def test_anything_outside_is_forbidden_without_naming_it(tmp_path: Path, source: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to("/etc")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ForbiddenSourceError) as caught:
        resolve_source(source, [tmp_path / "root"])
    assert str(tmp_path) not in caught.value.message


def test_sibling_with_the_same_prefix_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    with pytest.raises(ForbiddenSourceError):
        resolve_source(str(tmp_path / "root2"), [tmp_path / "root"])


def test_without_roots_everything_is_forbidden(tmp_path: Path) -> None:
    with pytest.raises(ForbiddenSourceError):
        resolve_source(str(tmp_path), [])


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 5000])
def test_what_is_no_path_is_a_bad_request(tmp_path: Path, source: str) -> None:
    with pytest.raises(InvalidRequestError):
        resolve_source(source, [tmp_path])
