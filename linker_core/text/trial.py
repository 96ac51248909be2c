"""Has a stranger's tokenizer and chat template tried in a process of its own before they are used.

A tokenizer runs inside this process afterwards, so what could end it or keep it busy for ever is to
show before. What passed once is not tried again as long as this process lives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import Final

from linker_core.errors import BadCheckpointError, InsufficientCapacityError, NotReadyError
from linker_core.lifeline import stop_signals_blocked
from linker_core.text.files import TOKENIZER_FILE, TokenizerFiles
from linker_core.text.template_frames import worker_environment
from linker_core.text.template_source import TemplateSource

_COMMAND: Final = (sys.executable, "-P", "-m", "linker_core.text.trial_worker")
_PROBES_S: Final = 5.0  # of processor time
_BYTES_PER_S: Final = 2 << 20  # of a tokenizer.json, for building it
_WALL_S: Final = 120.0  # on a machine that is busy with other things
_MAX_PASSED: Final = 4096
_THREADS: Final = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

_passed: OrderedDict[str, None] = OrderedDict()
_passed_lock = threading.Lock()  # guards `_passed`: models are read in threads


def pass_trial(files: TokenizerFiles | None, template: TemplateSource | None) -> None:
    """Tries what has not been tried yet. Blocking.

    Args:
        files: Of the tokenizer; None for none.
        template: The chat template; None for none.

    Raises:
        BadCheckpointError: One of them is malformed, takes too long or too much memory, or ends
            the process that tries it.
        InsufficientCapacityError: The machine has no memory to try them.
        NotReadyError: It starts no process now.
    """
    tokenizer_key = None if files is None else files.digest
    template_key = None if template is None else template.digest
    if _has_passed(tokenizer_key):
        files = None
    if _has_passed(template_key):
        template = None
    if files is None and template is None:
        return
    _try(files, template)
    for key in (tokenizer_key, template_key):
        _note_passed(key)


def _try(files: TokenizerFiles | None, template: TemplateSource | None) -> None:
    data = b"" if files is None else files.data
    head = {
        "template": None if template is None else template.text,
        "origin": None if template is None else template.origin,
        "settings": {} if files is None else files.settings,
        "tokenizer_bytes": len(data),
        "tokenizer_s": _PROBES_S + len(data) / _BYTES_PER_S,
    }
    try:
        with stop_signals_blocked():
            done = subprocess.run(
                _COMMAND,
                input=json.dumps(head).encode() + b"\n" + data,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=worker_environment(os.environ) | _THREADS,
                timeout=_WALL_S,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise _came_to_no_end(files) from error
    except OSError as error:
        raise NotReadyError(
            "The server can start no process to try the model's tokenizer; try again in a moment."
        ) from error
    if done.returncode == -signal.SIGPROF:
        raise _came_to_no_end(files)
    if done.returncode == -signal.SIGKILL:
        raise InsufficientCapacityError(
            "The process that tries the model's tokenizer was killed, most likely because the "
            "machine has no memory left. Unload a model, or give the server more memory."
        )
    if done.returncode != 0:
        raise BadCheckpointError(
            f"{_named(files)} ends the process that tries it. Load and save it once more with a "
            "current version of its library."
        )
    if "error" in (verdict := json.loads(done.stdout)):
        raise BadCheckpointError(verdict["error"])


def _came_to_no_end(files: TokenizerFiles | None) -> BadCheckpointError:
    return BadCheckpointError(f"{_named(files)} takes far too long over short texts.")


def _named(files: TokenizerFiles | None) -> str:
    return "The chat template" if files is None else f"{TOKENIZER_FILE} or the chat template"


def _has_passed(key: str | None) -> bool:
    with _passed_lock:
        return key in _passed


def _note_passed(key: str | None) -> None:
    if key is None:
        return
    with _passed_lock:
        _passed[key] = None
        _passed.move_to_end(key)
        if len(_passed) > _MAX_PASSED:
            _passed.popitem(last=False)
