"""What eviction frees, how fast evicted models come back, and what others feel of an admission.

Everything is asked of a running server over HTTP, as an operator and a user would.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx
import numpy as np

from server.cli.bench import servers
from server.cli.bench.admission import touch_free_memory
from server.cli.bench.http_streams import complete
from server.cli.bench.scenario import PROMPT_TOKENS, Settings
from server.cli.bench.servers import Server
from server.cli.bench.synthetic import Kinship

_NUM_STREAMS: Final = 2
_READ_BYTES: Final = 4 << 20
_SLACK_S: Final = 0.05  # of a reload, beside twice the time of reading
_TIMEOUT_S: Final = 900
_TUNING_S: Final = 60.0  # of a search that may take many minutes beside streams
_WEIGHTS: Final = 'linker_device_memory_bytes{device="cpu",state="weights"} '


def measure_reload(settings: Settings) -> dict[str, Any]:
    """Evicts variants and asks for them again, beside reading as many bytes from the page cache."""
    models = [
        *settings.family(Kinship.NEAR, 2),  # no tensor of the base's
        *settings.family(Kinship.OWN_HEAD, 2)[1:],  # its embedding alone
    ]
    with serving_models(models) as server, client_of(server) as client:
        server.warm_up()
        return {
            "command": str(server.kind.launch),
            **{
                f"{path.name} {memory}": _reloads(client, path, settings, touched=touched)
                for path in models[1:]
                for memory, touched in (("untouched", False), ("touched", True))
            },
        }


def _reloads(
    client: httpx.Client, path: Path, settings: Settings, *, touched: bool
) -> dict[str, Any]:
    """Returns what reloads of a variant took.

    Args:
        client: Of the server.
        path: The variant's.
        settings: How often.
        touched: Whether free memory is written to first; see `touch_free_memory`.
    """
    name = path.name
    unique_bytes = client.get(f"/models/{name}").raise_for_status().json()["bytes"]["unique"]
    freed: set[int] = set()
    reloads: list[float] = []
    reads: list[float] = []
    for _ in range(settings.rounds):
        before = _weight_bytes(client)
        client.post("/models/unload", json={"model": name}).raise_for_status()
        freed.add(before - _weight_bytes(client))
        reads.append(_read_s(path, unique_bytes))
        if touched:
            touch_free_memory(2 * unique_bytes)
        started = time.perf_counter()
        client.post("/models/load", json={"model": name}).raise_for_status()
        reloads.append(time.perf_counter() - started)
    return {
        "unique_bytes": unique_bytes,
        "freed_bytes": sorted(freed),
        "read_s": median(reads),
        "reload_s": median(reloads),
        # At most 1: twice the reading, and 50 ms.
        "of_bar": median(
            reload_s / (2 * read_s + _SLACK_S)
            for reload_s, read_s in zip(reloads, reads, strict=True)
        ),
    }


def _weight_bytes(client: httpx.Client) -> int:
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    (line,) = (line for line in lines if line.startswith(_WEIGHTS))
    return int(float(line.removeprefix(_WEIGHTS)))


def _read_s(path: Path, nbytes: int) -> float:
    """Reads that many bytes of a checkpoint into a buffer that is used again and again."""
    buffer = memoryview(bytearray(_READ_BYTES))
    left = nbytes
    started = time.perf_counter()
    while left > 0:
        for shard in sorted(path.glob("*.safetensors")):
            with shard.open("rb", buffering=0) as file:
                while left > 0 and (num_read := file.readinto(buffer)):
                    left -= num_read
    return time.perf_counter() - started


def measure_admission(settings: Settings) -> dict[str, Any]:
    """Streams of the base alone, and while variants that share nothing are admitted."""
    return _admissions(settings, policy="exact", limit_s=_TIMEOUT_S)


def measure_tuning(settings: Settings) -> dict[str, Any]:
    """Streams of the base alone, and for a minute of an admission that measures prices."""
    return _admissions(settings, policy="budget", limit_s=_TUNING_S)


def _admissions(settings: Settings, *, policy: str, limit_s: float) -> dict[str, Any]:
    base, *variants = settings.family(Kinship.NEAR, settings.rounds + 1)
    idle: list[float] = []
    ratios: list[float] = []
    seconds: list[float] = []
    with serving_models([base]) as server, client_of(server) as client:
        server.warm_up()
        for variant in variants:
            alone, beside = Gaps(), Gaps()
            with streaming(server, settings, alone):
                alone.until(4 * settings.tokens)
            started = time.perf_counter()
            with streaming(server, settings, beside):
                _admit(client, variant, policy=policy, limit_s=limit_s)
                seconds.append(time.perf_counter() - started)
            idle.append(alone.p99_s)
            ratios.append(beside.p99_s / alone.p99_s)
            print(
                f"p99 of {len(alone.values)} gaps alone {alone.p99_s * 1e3:.0f} ms, of "
                f"{len(beside.values)} beside the admission {beside.p99_s * 1e3:.0f} ms",
                file=sys.stderr,
            )
        return {
            "command": str(server.kind.launch),
            "policy": policy,
            "admission_s": median(seconds),
            "idle_p99_ms": median(idle) * 1e3,
            "p99_ratio": median(ratios),
            "p99_ratios": ratios,
        }


def _admit(client: httpx.Client, variant: Path, *, policy: str, limit_s: float) -> None:
    """Onboards a variant and waits for the end, or cancels it after the time."""
    body = {"name": variant.name, "source": str(variant), "donor": "base", "policy": policy}
    job = client.post("/models", json=body).raise_for_status().json()
    give_up_at = time.monotonic() + limit_s
    while job["status"] in ("queued", "running"):
        if time.monotonic() > give_up_at:
            client.post(f"/models/jobs/{job['id']}/cancel").raise_for_status()
            return
        time.sleep(0.1)
        job = client.get(f"/models/jobs/{job['id']}").raise_for_status().json()
    if job["status"] == "succeeded":
        client.delete(f"/models/{variant.name}").raise_for_status()


@dataclass(slots=True)
class Gaps:
    """Seconds between tokens of streams that run again and again."""

    values: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    grown: threading.Condition = field(default_factory=threading.Condition)

    @property
    def p99_s(self) -> float:
        return float(np.percentile(np.array(self.values), 99))

    def add(self, values: Sequence[float]) -> None:
        with self.grown:
            self.values += values
            self.grown.notify_all()

    def until(self, num_gaps: int) -> None:
        """Waits for that many."""
        with self.grown:
            self.grown.wait_for(lambda: len(self.values) >= num_gaps, timeout=_TIMEOUT_S)


_seeds = count(1)  # no prompt comes twice: nothing is found in a prefix cache


@contextmanager
def streaming(server: Server, settings: Settings, gaps: Gaps) -> Iterator[None]:
    """Keeps streams of the first model going until the block ends."""

    def stream() -> None:
        while not gaps.ended.is_set():
            requests = server.requests(
                [0] * _NUM_STREAMS,
                prompt_tokens=PROMPT_TOKENS,
                max_tokens=settings.tokens,
                seed=next(_seeds),
            )
            gaps.add(complete(requests).gaps_s)

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        yield
    finally:
        gaps.ended.set()
        thread.join()


@contextmanager
def serving_models(models: Sequence[Path]) -> Iterator[Server]:
    """Yields a server of models with a state of its own."""
    with (
        tempfile.TemporaryDirectory() as state,
        servers.serving(servers.linker(models, Path(state)), watched=False) as server,
    ):
        yield server


def client_of(server: Server) -> httpx.Client:
    """Returns an operator's client of a server."""
    return httpx.Client(base_url=server.url, timeout=_TIMEOUT_S, trust_env=False)


SCENARIOS: Final = {
    "reload": measure_reload,
    "admission": measure_admission,
    "tuning": measure_tuning,
}
