from __future__ import annotations

from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError
from server.registry.lock import StateLock


def test_second_holder_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first = StateLock(tmp_path / "new" / "state")
    with pytest.raises(InvalidRequestError, match="Another server"):
        StateLock(tmp_path / "new" / "state")
    first.release()
    StateLock(tmp_path / "new" / "state").release()


def test_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequestError, match="cannot be used"):
        StateLock(tmp_path / "file" / "state")
