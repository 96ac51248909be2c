"""A fake hub with a model on it, and this server's side of it without a worker process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.onboarding.hub import worker
from server.onboarding.hub.cache import HubCache
from server.onboarding.hub.limits import HubLimits
from server.onboarding.hub.source import HubSource
from server.settings import HubSettings
from tests.server.onboarding.fake_hub import FakeHub

REPO = "acme/base"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
WEIGHTS = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(2048))  # 64 KiB
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The two sides."""

    hub: FakeHub
    directory: Path
    limits: HubLimits

    @property
    def cache(self) -> HubCache:
        return HubCache(self.directory)

    @property
    def source(self) -> HubSource:
        return self.at_commit(REPO)

    def at_commit(self, repo: str) -> HubSource:
        return HubSource(repo=repo, revision=self.hub.repositories[repo].commit)

    def look(self, source: str = f"hub:{REPO}", **options: Any) -> dict[str, Any]:
        return self.perform("look", source, **options)

    def fetch(self, source: HubSource | None = None, **options: Any) -> Path:
        """Downloads a source and returns where it is."""
        source = source or self.source
        result = self.perform("fetch", str(source), **options)
        snapshot = self.cache.find(HubSource.parse(result["source"]))
        assert snapshot is not None
        return snapshot.path

    def perform(
        self, task: str, source: str, *, token: str | None = None, **limits: Any
    ) -> dict[str, Any]:
        said = {
            "task": task,
            "source": source,
            "directory": str(self.directory),
            "limits": replace(self.limits, **limits).to_json(),
        }
        return worker.perform(said, token=token)

    def part(self, name: str = "model.safetensors") -> Path:
        return self.directory / "unfinished" / self.source.key / f"{name}.part"

    def files(self) -> set[str]:
        """Every file under the directory, relative to it."""
        found = (path for path in self.directory.rglob("*") if path.is_file())
        return {str(path.relative_to(self.directory)) for path in found}


@contextmanager
def site(tmp_path: Path) -> Iterator[Site]:
    with FakeHub().running() as hub:
        hub.add(REPO, FILES)
        settings = HubSettings(endpoint=hub.endpoint, keep_free_bytes=0)
        limits = HubLimits.of(settings, retry_wait_s=0.001)
        yield Site(hub=hub, directory=tmp_path / "hub", limits=limits)
