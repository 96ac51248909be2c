"""A Prometheus of the tests' own: Debian's program and the shipped configuration."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import yaml

from tests.monitoring.promtool import CONFIG
from tests.programs import program

DEADLINE_S = 90.0
_LISTENS = re.compile(r'msg="Listening on" address=(\S+)')


class Sample(NamedTuple):
    """A series of an answer: its labels, and its values from the oldest on."""

    labels: Mapping[str, str]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        return self.values[-1]


class Prometheus:
    """A running Prometheus that scrapes one server every second."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.client = httpx.Client(base_url=url, timeout=DEADLINE_S, trust_env=False)
        self._process = process
        self._log = log

    @classmethod
    @contextmanager
    def watching(cls, server: str, key: str, directory: Path) -> Iterator[Self]:
        """Runs one until the block ends.

        Args:
            server: HOST:PORT to scrape.
            key: What the scrape shows.
            directory: Where it keeps its data; made.
        """
        directory.mkdir()
        config = _adapted(server, key, directory)
        command = [
            str(program("prometheus", what="Prometheus")),
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ]
        log = directory / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | {"GOMAXPROCS": "1"},
            )
        try:
            running = cls(_address(process, log), process, log)
            running.until(lambda: running.client.get("/-/ready").status_code == httpx.codes.OK)
            yield running
            running.client.close()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE_S)

    def until(self, condition: Callable[[], bool]) -> None:
        """Polls until the condition holds; fails after the deadline."""
        give_up_at = time.monotonic() + DEADLINE_S
        while not condition():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < give_up_at, "the condition did not come true"
            time.sleep(0.1)

    def until_scraped(self, *, times: int = 2) -> None:
        """Waits for scrapes that begin after this call, and for the rules after them."""
        count = "sum(count_over_time(up[1h]))"
        before = self.value(count) if self.query(count) else 0.0
        # One may be under way, and what rules make of the last comes with their next evaluation.
        wanted = before + times + 2
        self.until(lambda: bool(self.query(count)) and self.value(count) >= wanted)

    def query(self, expression: str) -> list[Sample]:
        """Returns what an expression gives now."""
        data = self._get("query", query=expression)
        if data["resultType"] == "scalar":
            return [Sample({}, (float(data["result"][1]),))]
        return [Sample(row["metric"], (float(row["value"][1]),)) for row in data["result"]]

    def now_s(self) -> float:
        """Returns its time."""
        return self.value("time()")

    def query_range(self, expression: str, *, since_s: float) -> list[Sample]:
        """Returns what an expression gave, second by second, from a time on."""
        span = {"start": since_s, "end": self.now_s(), "step": 1}
        data = self._get("query_range", query=expression, **span)
        return [
            Sample(row["metric"], tuple(float(value) for _, value in row["values"]))
            for row in data["result"]
        ]

    def value(self, expression: str) -> float:
        """Returns the one number that an expression gives."""
        [sample] = self.query(expression)
        return sample.last

    def has_data(self, expression: str) -> bool:
        """Returns whether an expression gives a number now."""
        return any(math.isfinite(sample.last) for sample in self.query(expression))

    def label_values(self, label: str, *, of: str | None = None) -> list[str]:
        """Returns the values of a label, of all series or of those that a selector chooses."""
        data: list[str] = self._get(f"label/{label}/values", **({"match[]": of} if of else {}))
        return data

    def series(self, selector: str) -> list[dict[str, str]]:
        """Returns the labels of the series that a selector chooses."""
        data: list[dict[str, str]] = self._get("series", **{"match[]": selector})
        return data

    def metadata(self) -> dict[str, dict[str, str]]:
        """Returns type and help of every family, as the server says them."""
        return {name: rows[0] for name, rows in self._get("metadata").items()}

    def own_values(self, metric: str) -> list[float]:
        """Returns the values of a metric of this Prometheus itself."""
        lines = self.client.get("/metrics").text.splitlines()
        own = re.compile(rf"{metric}(?:\{{.*\}})? (\S+)")
        return [float(match[1]) for line in lines if (match := own.fullmatch(line))]

    def _get(self, what: str, **parameters: Any) -> Any:
        answer = self.client.get(f"/api/v1/{what}", params=parameters)
        assert answer.status_code == httpx.codes.OK, f"{parameters}: {answer.text}"
        return answer.json()["data"]


def _adapted(server: str, key: str, directory: Path) -> Path:
    """Writes the shipped configuration for another server and key, and an interval of a second."""
    shutil.copytree(CONFIG.parent / "rules", directory / "rules")
    (directory / "key").write_text(key)
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [job] = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(directory / "key")
    job["static_configs"] = [{"targets": [server]}]
    path = directory / CONFIG.name
    path.write_text(yaml.safe_dump(config))
    return path


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    give_up_at = time.monotonic() + DEADLINE_S
    while (found := _LISTENS.search(log.read_text())) is None:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up_at, log.read_text()
        time.sleep(0.02)
    return f"http://{found[1]}"
