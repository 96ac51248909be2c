"""Servers that clients talk to: with the real engine, and with one that says what it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from server.bridge.supervisor import SupervisionLimits
from server.registry.records import Role
from tests.clients.environments import Addresses
from tests.clients.programs.scenarios import DONOR, VARIANT
from tests.server.cached_scan import CACHE_VARIABLE
from tests.server.fake_engine import Fault
from tests.server.keyed import give_key
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

# ChatML whose calls are those of Hermes, as Qwen's templates have them.
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall functions as <tool_call>"
    '{"name": ..., "arguments": ...}</tool_call>: {{ tools | tojson }}<|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The fake engine answers with the prompt, so this one's answers are the last message.
ECHO_TEMPLATE = "{% if tools %}{# <tool_call> #}{% endif %}{{ messages[-1]['content'] }}<|im_end|>"
_CONTEXT_TOKENS = 4096
_RESTART_AFTER_S = 1.0  # of a dead engine; requests meanwhile meet a 503
_MAX_INFLIGHT = 4


def chat_family(root: Path, template: str) -> dict[str, Path]:
    """Writes a donor and a variant whose template knows tools; returns the paths by name."""
    base = make_checkpoint(root / "base", tie=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": _CONTEXT_TOKENS})
    )
    near = make_variant(root / "near", base, scale=0.01)
    for path in (base, near):
        (path / "chat_template.jinja").write_text(template)
    return {DONOR: base, VARIANT: near}


@pytest.fixture(scope="session", autouse=True)
def _scans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where `cached_scan` remembers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("scans")))
        yield


@pytest.fixture(scope="session")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The real engine with a donor and a variant."""
    models = chat_family(tmp_path_factory.mktemp("answering"), TOOLS_TEMPLATE)
    with live_server(
        tmp_path_factory.mktemp("state"),
        models=models,
        engine_command=None,
        settings={"engine": {"kv_cache_tokens": 16_384}},
    ) as live:
        live.until_ready()
        yield live


@pytest.fixture(scope="session")
def echoing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The fake engine: chats are answered with their last message, prompts with themselves."""
    root = tmp_path_factory.mktemp("echoing")
    with live_server(
        tmp_path_factory.mktemp("state"),
        models=chat_family(root, ECHO_TEMPLATE),
        root=root,
        limits=replace(SupervisionLimits(), backoff_s=_RESTART_AFTER_S, max_crashes=1000),
        settings={"http": {"max_inflight": _MAX_INFLIGHT}},
    ) as live:
        live.until_ready()
        yield live


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """A server that wants keys, and some by name."""

    live: LiveServer
    keys: dict[str, str]


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The fake engine behind keys: a client's, and one for a single request a minute."""
    root, state = tmp_path_factory.mktemp("guarded"), tmp_path_factory.mktemp("state")
    keys = {
        "client": give_key(state, Role.CLIENT).key,
        "slow": give_key(state, Role.CLIENT, requests_per_minute=1).key,
    }
    with live_server(state, models=chat_family(root, ECHO_TEMPLATE)) as live:
        live.until_ready()
        yield Guarded(live=live, keys=keys)


@pytest.fixture(scope="session")
def addresses(answering: LiveServer, echoing: LiveServer, guarded: Guarded) -> Addresses:
    """What programs are told."""
    return Addresses(
        answering=answering.url,
        echoing=echoing.url,
        spare=str(echoing.served(VARIANT).text.path),
        guarded=guarded.live.url,
        keys=guarded.keys,
        faults={fault.name: fault.value for fault in Fault},
    )
