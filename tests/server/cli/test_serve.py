from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from linker_core.text.tokenizer import Tokenizer
from server.cli.serve import listen
from tests.server.cli.fake_serve import BREAK_VARIABLE, ENGINE_VARIABLE
from tests.server.fake_engine import FAKE_ENGINE, MUTE_ENGINE, Fault

DEADLINE_S = 60.0


class Served:
    """A `linker serve` process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self._url: str | None = None
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                self._url = found[1]
                self._listening.set()
        self._listening.set()

    @property
    def url(self) -> str:
        assert self._listening.wait(DEADLINE_S)
        assert self._url is not None, self.log
        return self._url

    def until(self, path: str, condition: Callable[[httpx.Response], bool]) -> None:
        give_up_at = time.monotonic() + DEADLINE_S
        while not condition(httpx.get(f"{self.url}{path}", trust_env=False)):
            assert time.monotonic() < give_up_at, self.log
            time.sleep(0.02)

    def until_ready(self) -> None:
        self.until("/ready", lambda response: response.status_code == 200)

    def until_running(self) -> None:
        sample = 'linker_num_requests_running{model="base"} 1'
        self.until("/metrics", lambda response: sample in response.text)

    def ends(self) -> int:
        status = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@contextmanager
def serving(
    tmp_path: Path,
    *arguments: str,
    engine: Sequence[str] = FAKE_ENGINE,
    break_at: Path | None = None,
) -> Iterator[Served]:
    """Runs the command; once `break_at` exists, one of its background tasks fails."""
    more = {ENGINE_VARIABLE: json.dumps(engine)}
    if break_at is not None:
        more[BREAK_VARIABLE] = str(break_at)
    command = (sys.executable, "-m", "tests.server.cli.fake_serve", "--state", str(tmp_path / "s"))
    process = subprocess.Popen(
        (*command, "--port", "0", *arguments),
        env={**os.environ, **more},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group to signal as a whole
    )
    served = Served(process)
    try:
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        served.ends()


def engine_of(served: Served) -> psutil.Process:
    children = psutil.Process(served.process.pid).children()
    return next(child for child in children if "tests.server.fake_engine" in child.cmdline())


def stream(served: Served, prompt: list[int], max_tokens: int) -> httpx.Response:
    body = {"model": "base", "prompt": prompt, "max_tokens": max_tokens, "stream": True}
    return httpx.post(
        f"{served.url}/v1/completions", json=body, timeout=DEADLINE_S, trust_env=False
    )


def cut_off(served: Served) -> None:
    with pytest.raises(httpx.HTTPError):
        stream(served, [Fault.MUTE, 50], 20)


def test_sigterm_lets_streams_finish_and_exits_0(tmp_path: Path, family: Path) -> None:
    with serving(tmp_path, "--model", f"base={family / 'base'}") as served:
        served.until_ready()
        engine, ended = engine_of(served), list[httpx.Response]()
        text = threading.Thread(target=lambda: ended.append(stream(served, [Fault.SLOW, 50], 20)))
        text.start()
        served.until_running()
        served.process.send_signal(signal.SIGTERM)
        text.join(DEADLINE_S)
        assert ended[0].text.endswith("data: [DONE]\n\n")
        last = json.loads(ended[0].text.split("\n\n")[-3].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert served.ends() == 0
        assert not engine.is_running()
    [drains] = [line for line in served.log if "draining" in line]
    assert "answers still running: 1" in drains
    assert "a second signal, such as Ctrl-C again, ends at once" in drains
    assert f"engine {engine.pid} stopped\n" in served.log[-1]


def test_sigterm_to_the_whole_group_drains_as_well(tmp_path: Path, family: Path) -> None:
    with serving(tmp_path, "--model", f"base={family / 'base'}") as served:
        served.until_ready()
        ended = list[httpx.Response]()
        text = threading.Thread(target=lambda: ended.append(stream(served, [Fault.SLOW, 50], 20)))
        text.start()
        served.until_running()
        os.killpg(served.process.pid, signal.SIGTERM)
        text.join(DEADLINE_S)
        assert '"finish_reason":"length"' in ended[0].text
        assert served.ends() == 0


def test_streams_past_the_deadline_end_with_an_error_and_status_1(
    tmp_path: Path, family: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("http: {drain_s: 0.2}\n")
    arguments = ("--config", str(config), "--model", f"base={family / 'base'}")
    with serving(tmp_path, *arguments) as served:
        served.until_ready()
        ended = list[httpx.Response]()
        text = threading.Thread(target=lambda: ended.append(stream(served, [Fault.MUTE, 50], 20)))
        text.start()
        served.until_running()
        served.process.send_signal(signal.SIGTERM)
        text.join(DEADLINE_S)
        assert '"code":"engine_failure"' in ended[0].text
        assert ended[0].text.endswith("data: [DONE]\n\n")
        assert served.ends() == 1


def test_waiting_onboarding_ends_with_503_at_sigterm_and_resumes(
    tmp_path: Path, family: Path
) -> None:
    root = ("--models-root", str(family))
    ended = list[httpx.Response]()
    with serving(tmp_path, *root, engine=MUTE_ENGINE) as served:
        body = {"name": "base", "source": str(family / "base")}
        url = f"{served.url}/models?wait=true"
        waiting = threading.Thread(
            target=lambda: ended.append(
                httpx.post(url, json=body, timeout=DEADLINE_S, trust_env=False)
            )
        )
        waiting.start()
        served.until("/models/jobs", lambda response: bool(response.json()["data"]))
        served.process.send_signal(signal.SIGTERM)
        waiting.join(DEADLINE_S)
        assert served.ends() == 0
    assert ended[0].status_code == 503
    assert ended[0].json()["error"]["code"] == "not_ready"
    assert ended[0].headers["Retry-After"]
    with serving(tmp_path, *root) as served:
        served.until_ready()


def test_broken_background_task_ends_streams_with_an_error_and_status_1(
    tmp_path: Path, family: Path
) -> None:
    sign = tmp_path / "break"
    with serving(tmp_path, "--model", f"base={family / 'base'}", break_at=sign) as served:
        served.until_ready()
        ended = list[httpx.Response]()
        text = threading.Thread(target=lambda: ended.append(stream(served, [Fault.MUTE, 50], 20)))
        text.start()
        served.until_running()
        sign.touch()
        text.join(DEADLINE_S)
        assert '"code":"engine_failure"' in ended[0].text
        assert ended[0].text.endswith("data: [DONE]\n\n")
        assert served.ends() == 1
        assert any("the server cannot go on" in line for line in served.log)


def test_device_that_is_not_there_ends_the_server_with_one_line(tmp_path: Path) -> None:
    command = (
        *(sys.executable, "-m", "server.cli.main", "serve", "--device", "cuda"),
        *("--port", "0", "--state", str(tmp_path)),
    )
    done = subprocess.run(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()  # so nothing has listened
    assert "device cuda cannot be used" in line


def test_second_signal_exits_at_once(tmp_path: Path, family: Path) -> None:
    with serving(tmp_path, "--model", f"base={family / 'base'}") as served:
        served.until_ready()
        engine = engine_of(served)
        waiting = threading.Thread(target=cut_off, args=(served,))
        waiting.start()
        served.until_running()
        served.process.send_signal(signal.SIGINT)
        served.until("/ready", lambda response: response.status_code == 503)
        served.process.send_signal(signal.SIGINT)
        assert served.ends() == 1
        assert any("a second signal" in line for line in served.log)
        waiting.join(DEADLINE_S)
        psutil.wait_procs([engine], DEADLINE_S)
        assert not engine.is_running()


def test_engine_does_not_outlive_a_killed_server(tmp_path: Path, family: Path) -> None:
    with serving(tmp_path, "--model", f"base={family / 'base'}") as served:
        served.until_ready()
        engine = engine_of(served)
        served.process.kill()
        served.ends()
        assert psutil.wait_procs([engine], DEADLINE_S)[0]


def test_strict_exits_when_a_start_up_model_fails(tmp_path: Path, family: Path) -> None:
    models = (f"base={family / 'base'}", f"broken={family / 'nowhere'}")
    with serving(tmp_path, "--strict", "--model", *models) as served:
        assert served.ends() == 1
    last = served.log[-1]
    assert "ERROR --strict: start-up models failed: broken: " in last
    assert "No such file or directory" in last


def test_port_in_use_is_one_line_and_status_2(tmp_path: Path) -> None:
    with serving(tmp_path) as first:
        port = first.url.rsplit(":", 1)[1]
        with serving(tmp_path / "other", "--port", port) as second:
            assert second.ends() == 2
            assert len(second.log) == 1
            assert port in second.log[0]


def test_no_prompt_or_answer_is_logged(tmp_path: Path, family: Path) -> None:
    asked, answered = "Xq7canary", "zW3finch"
    # Given as ids, so that its text exists in the answer alone.
    ids = Tokenizer.load(family / "base").encode(answered, add_special_tokens=False)
    requests: list[tuple[int, str, dict[str, object]]] = [
        (200, "chat/completions", {"messages": [{"role": "user", "content": asked}]}),
        (200, "completions", {"prompt": asked, "surprise": asked, "stream": True}),
        (400, "completions", {"prompt": asked, "n": asked}),
        (200, "completions", {"prompt": ids, "max_tokens": len(ids)}),
    ]
    with serving(tmp_path, "--model", f"base={family / 'base'}") as served:
        served.until_ready()
        for status, path, body in requests:
            response = httpx.post(
                f"{served.url}/v1/{path}", json={"model": "base", **body}, trust_env=False
            )
            assert response.status_code == status, response.text
        assert response.json()["choices"][0]["text"] == answered
        served.process.send_signal(signal.SIGTERM)
        assert served.ends() == 0
    log = "".join(served.log)
    assert "surprise" in log
    assert asked not in log
    assert answered not in log


def test_connections_send_what_they_have_at_once() -> None:
    with (
        closing(listen("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
