"""The page is in what is installed."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

from hatchling.builders.wheel import WheelBuilder

from server.ui.assets import asset_files

_PROJECT = Path(__file__).parents[3]


def test_wheel_holds_every_file_of_the_page(tmp_path: Path) -> None:
    [wheel] = WheelBuilder(str(_PROJECT)).build(directory=str(tmp_path), versions=["standard"])
    with ZipFile(wheel) as built:
        for name, path in asset_files().items():
            if path.is_relative_to(_PROJECT / "server"):
                assert built.read(f"server/ui/page/{name}") == path.read_bytes()
        assert "server/ui/page/index.html" in built.namelist()
