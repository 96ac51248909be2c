"""A disposable process that studies one family: `python -m analysis.worker`.

Reads what to study as one JSON line on stdin, after it a line of each record that an earlier worker
of the same study has said, then `busy` and `idle` lines, and prints JSON lines on stdout: the files
that it has opened, a record of each tensor as it is known, then the summary or one error. What
there is a record of is not computed again, so killing it at any moment loses no more than the
tensors in hand. Of an error that is one model's, `param` says whose: `base` or `variants.NAME`. It
reads files through maps: a death without a result means that a file was cut short under its hands.
Knows no server and no database.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.record import TensorStudy
from analysis.selection import select
from analysis.study import study_tensor
from analysis.summary import summarise
from linker_core.errors import (
    BadCheckpointError,
    InsufficientCapacityError,
    LinkerError,
    from_record,
)
from linker_core.lifeline import die_with_parent
from linker_core.pace import Pace
from linker_core.speech import say
from linker_core.weights.checkpoint import Identity

_NO_MEMORY = (
    "There is not enough memory to study the family's weights. Unload a model, or set "
    "analysis.enabled to false."
)


def main() -> int:
    """Studies one family; exit status 1 after an error line, or when nobody listens any more."""
    request = json.loads(sys.stdin.readline())
    done = _restored(sys.stdin.readline() for _ in range(request["num_done"]))
    pace = Pace()
    pace.follow(sys.stdin)
    try:
        say({"result": study(request, done, pace)})
    except LinkerError as error:
        say({"error": _discreet(error, request).to_record()})
        return 1
    except MemoryError:
        say({"error": InsufficientCapacityError(_NO_MEMORY).to_record()})
        return 1
    except BrokenPipeError:
        # What could not be said is still to be flushed when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def study(request: Mapping[str, Any], done: Iterable[TensorStudy], pace: Pace) -> dict[str, Any]:
    """Returns the summary of a study as JSON values, records of tensors said meanwhile.

    Args:
        request: `base` (`name` and `path`), `variants` (name -> path) and `seed`.
        done: Studies of tensors that need not be made again; those of others are left out.
        pace: Holds back while sequences run.

    Raises:
        BadCheckpointError: A file was written to meanwhile.
        LinkerError: See `StudiedFamily.open` and `gram_pass`.
    """
    variants = {name: Path(path) for name, path in request["variants"].items()}
    with StudiedFamily.open(Path(request["base"]["path"]), variants) as family:
        names = select(family.base)
        identities = {name: model.identity for name, model in family.variants.items()}
        base_identity = family.base.identity
        opened = {"base": base_identity, "variants": identities, "num_tensors": len(names)}
        say({"opened": opened})
        found = {
            one.name: one for one in done if one.name in names and len(one.norms) == len(variants)
        }
        for one in _studies(family, [name for name in names if name not in found], request, pace):
            _check_unchanged(family, (base_identity, *identities.values()))
            found[one.name] = one
            say({"record": one.to_json(), "spent": pace.spent})
    summary = summarise(
        [found[name] for name in names],
        base=request["base"]["name"] or Path(request["base"]["path"]).name,
        names=tuple(variants),
        seed=request["seed"],
    )
    return summary | {"background": pace.spent._asdict()}


def _studies(
    family: StudiedFamily, names: Sequence[str], request: Mapping[str, Any], pace: Pace
) -> Iterable[TensorStudy]:
    for gram in gram_pass(family, names, mapped=True, pace=pace):
        with pace.turn():
            rest = _rests(pace)
            one = study_tensor(gram, names=family.names, seed=request["seed"], rest=rest)
            rest()
        yield one


def _rests(pace: Pace) -> Callable[[], None]:
    """Returns what rests after the work since it was made, or last called."""
    began = time.monotonic()

    def rest() -> None:
        nonlocal began
        pace.after_work(time.monotonic() - began)
        began = time.monotonic()

    return rest


def _check_unchanged(family: StudiedFamily, opened: Sequence[Identity]) -> None:
    """Lets no record be said of other bytes than those whose identities were."""
    models = zip(family.checkpoints, family.params, opened, strict=True)
    for checkpoint, param, identity in models:
        if checkpoint.identity != identity:
            raise BadCheckpointError(
                f"{checkpoint.path}: a weight file changed while it was studied. Restore it, or "
                "onboard the model again.",
                param=param,
            )


def _restored(lines: Iterable[str]) -> list[TensorStudy]:
    """Returns the studies that lines hold; a damaged record is as good as none."""
    found = []
    for line in lines:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found.append(TensorStudy.from_json(json.loads(line)))
    return found


def _discreet(error: LinkerError, request: Mapping[str, Any]) -> LinkerError:
    """Returns an error that calls models by their names: directories are nobody's business."""
    message = error.message
    places = {request["base"]["path"]: request["base"]["name"] or "the base"}
    places |= {path: name for name, path in request["variants"].items()}
    for path in sorted(places, key=len, reverse=True):  # one may lie in another
        message = message.replace(path, places[path])
    return from_record(error.to_record() | {"message": message})


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main())
