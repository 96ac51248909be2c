from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from server.ui.assets import INDEX, asset_files, read_asset

_PAGE = Path(__file__).parents[3] / "server" / "ui" / "page"


def test_assets_are_every_file_of_the_page_and_the_charts() -> None:
    files = asset_files()
    assert set(files) == {path.name for path in _PAGE.iterdir()} | {"plotly.min.js"}
    assert INDEX in files
    assert files["plotly.min.js"].is_file()


@pytest.mark.parametrize("name", sorted(asset_files()))
def test_asset_is_read_once_and_is_the_same_compressed(name: str) -> None:
    path = asset_files()[name]
    asset = read_asset(path)
    assert asset is read_asset(path)
    assert asset.body == path.read_bytes() == gzip.decompress(asset.compressed)
    assert re.fullmatch(r'W/"[0-9a-f]{32}"', asset.etag)


def test_same_content_has_the_same_tag_and_other_content_another(tmp_path: Path) -> None:
    for name, text in (("a.js", "1"), ("b.js", "1"), ("c.js", "2")):
        (tmp_path / name).write_text(text)
    same, again, other = (read_asset(tmp_path / name) for name in ("a.js", "b.js", "c.js"))
    assert same.etag == again.etag != other.etag
    assert same.compressed == again.compressed


def test_style_sheets_that_the_page_keeps_out_are_all_that_plotly_would_add() -> None:
    files = asset_files()
    source = files["plotly.min.js"].read_text(encoding="utf-8")
    found = re.search(r"const STYLES = \[(.*?)\]", files["charts.js"].read_text(), re.DOTALL)
    assert found is not None
    kept_out = set(re.findall(r'"([^"]+)"', found[1]))
    added = set(re.findall(r'getElementById\("([0-9a-f]{64})"\)', source))  # of what it bundles
    assert kept_out == added | {"plotly.js-style-global"}
    assert '.matches(".no-inline-styles")' in source  # how it is told to leave them out
