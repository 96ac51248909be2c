"""The page's files, and the chart library's one: read and compressed once, when first asked for.

Knows no HTTP framework. Which names there are is decided when the table is made, so no name that
somebody asks for is ever a path.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

INDEX = "index.html"
_PAGE = Path(__file__).with_name("page")
_CHARTS = "plotly.min.js"  # of the installed package of that name, which ships it for pages
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """One file as it is sent."""

    media_type: str
    body: bytes
    compressed: bytes  # gzip
    etag: str  # weak, since it is the same for both encodings


def asset_files() -> Mapping[str, Path]:
    """Returns what the page consists of, by name."""
    files = {path.name: path for path in _PAGE.iterdir() if path.suffix in _MEDIA_TYPES}
    charts = distribution("plotly").locate_file(f"plotly/package_data/{_CHARTS}")
    return files | {_CHARTS: Path(str(charts))}


@cache
def read_asset(path: Path) -> Asset:
    """Returns a file of the page, from memory once it has been read. Blocking."""
    body = path.read_bytes()
    return Asset(
        media_type=_MEDIA_TYPES[path.suffix],
        body=body,
        compressed=gzip.compress(body, mtime=0),
        etag=f'W/"{hashlib.sha256(body).hexdigest()[:32]}"',
    )
