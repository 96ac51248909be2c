"""A process that renders chat templates: `python -m linker_core.text.template_worker`.

Reads requests on stdin and writes replies to stdout (`template_frames`), until stdin ends. A
request that takes too much processor time has the system kill it. Killing it at any moment harms
nothing but the request that it works on.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from typing import BinaryIO, Final

from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.text.chat_template import ChatTemplate
from linker_core.text.confinement import arm, confine
from linker_core.text.template_frames import (
    LENGTH_BYTES,
    MAX_REQUEST_BYTES,
    MAX_TEXT_BYTES,
    Outcome,
    Reply,
    Task,
    frame_length,
    parse_task,
    reply_frame,
    source_of,
)

MEMORY_BYTES: Final = 512 << 20
_MAX_TEMPLATES: Final = 32
_COMPILE_S: Final = 1.0  # of processor time, for a template that is new here


class Renderer:
    """Renders requests, and keeps the templates that were used last."""

    def __init__(self) -> None:
        self._templates: OrderedDict[str, ChatTemplate] = OrderedDict()

    def answer(self, task: Task) -> Reply:
        """Returns the reply to a request."""
        try:
            template = self._template(task)
            if template is None:
                return Reply(Outcome.UNKNOWN, "")
            arm(task.limit_s)
            text = template.render(json.loads(task.variables))
        except (InvalidRequestError, BadCheckpointError) as error:
            return Reply(Outcome.REFUSED, error.message)
        except (MemoryError, RecursionError):
            return Reply(Outcome.SPENT, "")
        finally:
            arm(0)
        if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            why = f"it makes more than {MAX_TEXT_BYTES >> 20} MiB of text"
            return Reply(
                Outcome.REFUSED, f"The model's chat template refuses these messages: {why}."
            )
        return Reply(Outcome.RENDERED, text)

    def _template(self, task: Task) -> ChatTemplate | None:
        """Returns the compiled template; None if it is not here and did not come along.

        Raises:
            BadCheckpointError: It does not compile.
        """
        template = self._templates.get(task.digest)
        if template is None:
            source = source_of(task)
            if source is None:
                return None
            arm(_COMPILE_S)
            template = self._templates[task.digest] = ChatTemplate(source)
            if len(self._templates) > _MAX_TEMPLATES:
                self._templates.popitem(last=False)
        self._templates.move_to_end(task.digest)
        return template


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers requests until there are no more, or memory ran out."""
    renderer = Renderer()
    while len(head := requests.read(LENGTH_BYTES)) == LENGTH_BYTES:
        length = frame_length(head)
        if length > MAX_REQUEST_BYTES:
            return
        content = requests.read(length)
        if len(content) < length:
            return
        reply = renderer.answer(parse_task(content))
        replies.write(reply_frame(reply))
        replies.flush()
        if reply.outcome is Outcome.SPENT:
            return


def main() -> int:
    """Serves the process's own pipes."""
    confine(memory_bytes=MEMORY_BYTES, is_alone=True)
    with os.fdopen(0, "rb") as requests, os.fdopen(1, "wb") as replies:
        serve(requests, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
