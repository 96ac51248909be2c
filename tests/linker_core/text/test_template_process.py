from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError
from linker_core.text import template_process as module
from linker_core.text.template_frames import (
    LENGTH_BYTES,
    MAX_REQUEST_BYTES,
    Outcome,
    Reply,
    Task,
    encode_variables,
    frame_length,
    parse_reply,
    parse_task,
    reply_frame,
    task_frame,
    worker_environment,
)
from linker_core.text.template_process import TemplateProcess, template_process
from linker_core.text.template_source import TemplateSource, template_variables
from linker_core.text.template_worker import Renderer, serve
from tests.templates import compiled, rendered
from tests.tiny import CHATML

HELLO = [{"role": "user", "content": "Hello, 世界!"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def asked() -> dict[str, object]:
    return template_variables(HELLO, add_generation_prompt=True, bos_token=None, eos_token=None)


def task(source: TemplateSource, *, with_source: bool = True) -> Task:
    text = source.text if with_source else None
    return Task(source.digest, text, 10.0, encode_variables(asked()))


def test_frames_are_read_as_they_were_written() -> None:
    frame = task_frame(task(TemplateSource.of("{{ 'ä\n' }}")))
    assert frame_length(frame[:LENGTH_BYTES]) == len(frame) - LENGTH_BYTES
    assert parse_task(frame[LENGTH_BYTES:]) == task(TemplateSource.of("{{ 'ä\n' }}"))
    for reply in (Reply(Outcome.RENDERED, "é\ud800\0\n"), Reply(Outcome.UNKNOWN, "")):
        assert parse_reply(reply_frame(reply)[LENGTH_BYTES:]) == reply


@pytest.mark.parametrize("content", [b"", b"\xff", b"\x00\xff\xff", b"\x07text"])
def test_reply_that_is_none_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_reply(content)


def test_worker_asks_for_a_template_that_it_does_not_have() -> None:
    source, renderer = TemplateSource.of(CHATML), Renderer()
    assert renderer.answer(task(source, with_source=False)).outcome is Outcome.UNKNOWN
    first = renderer.answer(task(source))
    assert first == Reply(Outcome.RENDERED, rendered(compiled(CHATML), HELLO))
    assert renderer.answer(task(source, with_source=False)) == first


def test_worker_keeps_the_templates_that_were_used_last() -> None:
    renderer = Renderer()
    sources = [TemplateSource.of(f"template {number}") for number in range(40)]
    for source in sources:
        renderer.answer(task(source))
    kept = [
        renderer.answer(task(s, with_source=False)).outcome is Outcome.RENDERED for s in sources
    ]
    assert kept == [False] * 8 + [True] * 32


def test_worker_refuses_templates_in_their_own_words() -> None:
    for source, words in (("{% if %}", "compile"), ("{{ raise_exception('no') }}", "no")):
        reply = Renderer().answer(task(TemplateSource.of(source)))
        assert reply.outcome is Outcome.REFUSED
        assert words in reply.text


def served(requests: bytes) -> bytes:
    replies = io.BytesIO()
    serve(io.BytesIO(requests), replies)
    return replies.getvalue()


def test_worker_ends_with_its_requests() -> None:
    frame = task_frame(task(TemplateSource.of("hello")))
    reply = reply_frame(Reply(Outcome.RENDERED, "hello"))
    assert served(b"") == b""
    assert served(frame * 3) == reply * 3
    assert served(frame + frame[:-1]) == reply
    assert served(frame + b"\0\0") == reply
    assert served((MAX_REQUEST_BYTES + 1).to_bytes(4, "little")) == b""


def test_process_renders_again_and_again() -> None:
    with TemplateProcess(TemplateSource.of(CHATML)) as process:
        for _ in range(3):
            assert process.render(asked()) == rendered(compiled(CHATML), HELLO)


def test_process_goes_on_after_a_refusal() -> None:
    source = TemplateSource.of("{% if tools %}{{ raise_exception('no tools') }}{% endif %}fine")
    with TemplateProcess(source) as process:
        with pytest.raises(InvalidRequestError, match="no tools"):
            process.render(asked() | {"tools": [{}]})
        assert process.render(asked()) == "fine"


def test_process_that_comes_to_no_end_is_stopped_and_another_follows() -> None:
    source = TemplateSource.of("{% if tools %}" + ENDLESS + "{% endif %}fine")
    with TemplateProcess(source, cpu_s=0.2, wall_s=120.0) as process:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="too long"):
                process.render(asked() | {"tools": [{}]})
            assert process.render(asked()) == "fine"


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(1000)",
        "import os; os.abort()",
        r"import os; os.write(1, b'\xff\xff\xff\x7f' + b'x' * 1000)",
        r"import os; os.write(1, b'\x01\x00\x00\x00\xff')",
    ],
)
def test_process_that_does_otherwise_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(module, "TEMPLATE_COMMAND", (sys.executable, "-c", program))
    with (
        TemplateProcess(TemplateSource.of("x"), wall_s=0.5) as process,
        pytest.raises(InvalidRequestError) as caught,
    ):
        process.render(asked())
    assert caught.value.param == "messages"


def test_closed_process_is_gone() -> None:
    with TemplateProcess(TemplateSource.of("x")) as process:
        process.render(asked())
        assert process._child is not None
        pid = process._child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_template_needs_no_process() -> None:
    with template_process(None) as process:
        assert process is None


def test_worker_sees_only_what_it_needs() -> None:
    environment = {"LANG": "C", "AWS_SECRET_ACCESS_KEY": "s", "PATH": "/bin", "TZ": "UTC"}
    seen = worker_environment(environment)
    assert seen == {"LANG": "C", "TZ": "UTC", "MALLOC_ARENA_MAX": "1", "PYTHONSAFEPATH": "1"}


def test_confined_process_writes_no_file_and_ends_with_its_processor_time(tmp_path: Path) -> None:
    program = f"""
import json, resource
from linker_core.text.confinement import arm, confine, less_memory
confine(memory_bytes=1 << 30)
try:
    with open({str(tmp_path / "file")!r}, "w") as file:
        file.write("x")
except OSError as error:
    print(json.dumps(error.strerror), flush=True)
with less_memory(256 << 20):
    try:
        bytearray(512 << 20)
    except MemoryError:
        print(json.dumps("no memory"), flush=True)
print(json.dumps(len(bytearray(512 << 20))), flush=True)
arm(0.05)
while True:
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        "File too large", "no memory", 512 << 20,
    ]  # fmt: skip
    assert done.returncode == -27  # SIGPROF


def test_confined_process_that_is_alone_starts_no_thread_and_no_process() -> None:
    program = """
import os, threading
from linker_core.text.confinement import confine
if not os.geteuid():  # whom nothing keeps from it
    os.setuid(65534)
confine(memory_bytes=1 << 30, is_alone=True)
for start in (os.fork, threading.Thread(target=print, args=("begun",)).start):
    try:
        start()
    except (BlockingIOError, RuntimeError):
        print("refused", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["refused", "refused"]


def test_template_worker_is_alone() -> None:
    with TemplateProcess(TemplateSource.of("hi")) as process:
        assert process.render(asked()) == "hi"
        assert process._child is not None
        bounds = resource.prlimit(process._child.pid, resource.RLIMIT_NPROC)
    assert bounds == (0, 0)
