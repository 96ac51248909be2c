"""The documentation's pictures of the page."""

from __future__ import annotations

import struct

import pytest

from tests.browser.gallery import FOLDER, MAX_PICTURE_BYTES, PICTURES, Picture


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_picture_is_there_as_wide_as_it_was_taken_and_small(picture: Picture) -> None:
    data = (FOLDER / f"{picture.name}.png").read_bytes()
    assert len(data) < MAX_PICTURE_BYTES
    width, _ = struct.unpack(">II", data[16:24])  # of the header, which comes first
    assert width == picture.size["width"]


def test_no_picture_is_kept_that_nobody_takes() -> None:
    assert {file.stem for file in FOLDER.glob("ui-*.png")} == {each.name for each in PICTURES}
