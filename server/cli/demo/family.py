"""The demo's family on disk: built once, whole or not at all. Knows no tensor and no server."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from linker_core.errors import LinkerError
from server.cli.demo.recipes import FAMILY, version

OnProgress = Callable[[str, int, int], None]  # model, steps done, steps in all
BUILD_COMMAND: Final = (sys.executable, "-m", "server.cli.demo.build")
_STAGING: Final = ".staging-"
_MAX_LOG_CHARS: Final = 600  # of a failed build's last words


def default_cache() -> Path:
    """Returns where families are kept: `linker-llm/demo` under the user's data directory."""
    data = os.environ.get("XDG_DATA_HOME", "")
    # The XDG rules say that a relative path is to be ignored.
    home = Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share"
    return home / "linker-llm" / "demo"


def ensure_family(
    cache: Path, on_progress: OnProgress, *, command: Sequence[str] = BUILD_COMMAND
) -> Path:
    """Returns the folder that holds a checkpoint per model, building it if it is not there yet.

    It is built beside its final place and renamed when every byte is on disk: an interrupted build
    leaves nothing. Two that start at once build once.

    Args:
        cache: Folder of families, one per version of the recipe.
        on_progress: Called after every step of the training.
        command: What builds a family into the folder that is its last argument.

    Raises:
        LinkerError: The folder cannot be written, or the training failed.
    """
    family = cache / version(FAMILY)
    if family.is_dir():
        return family
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache):
            if not family.is_dir():
                _build(family, on_progress, command)
    except OSError as error:
        raise LinkerError(
            f"the demo's models cannot be kept in {cache}: {error.strerror}; "
            "name another folder with --cache"
        ) from error
    return family


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Holds the folder against other builds; the kernel lets go when the process ends."""
    with (cache / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(family: Path, on_progress: OnProgress, command: Sequence[str]) -> None:
    for left_over in family.parent.glob(f"{_STAGING}*"):  # of a build that was killed
        shutil.rmtree(left_over)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=family.parent))
    try:
        _train(staging, on_progress, command)
        staging.chmod(0o755)
        _sync(staging)
        staging.rename(family)
        _sync_one(family.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already if it was renamed


def _train(staging: Path, on_progress: OnProgress, command: Sequence[str]) -> None:
    """Runs the training in a process of its own; a session too, so that Ctrl-C ends only us."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [*command, str(staging)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                step = json.loads(line)
                on_progress(step["model"], step["done"], step["total"])
            status = process.wait()
        except BaseException:
            process.kill()
            raise
        if status != 0:
            log.seek(0)
            raise LinkerError(
                f"training the demo's models failed with status {status}: "
                f"{log.read()[-_MAX_LOG_CHARS:].strip()}"
            )


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
