"""The server's settings: YAML and flags become one frozen tree, built once. Knows no tensor.

Unknown keys and values out of range are refused by name; the environment is not read here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from linker_core.config import EngineConfig, MatmulPrecision
from linker_core.errors import InvalidRequestError
from server.settings_errors import explain

_SIZE = re.compile(r"(\d+)\s*(?:([KMGT])(iB|B)?|B)?", re.IGNORECASE)
_DURATION = re.compile(r"(-?\d+(?:\.\d+)?)\s*([smhd]?)", re.IGNORECASE)
HUB_SCHEME = "hub:"  # what sources begin with that are downloaded
_HOST = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
_ALLOWED_HOST = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)$"
_ENDPOINT = (
    r"^https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:[0-9]{1,5})?"
    r"(/[A-Za-z0-9._~/-]*)?$"
)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(value: object) -> object:
    """Reads `8589934592`, `512M`, `8G` or `8GiB` as bytes; the letters are powers of 1024."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        msg = "a size is a number of bytes, or a number followed by K, M, G, T (powers of 1024)"
        raise ValueError(msg)
    number, letter, _ = match.groups()
    return int(number) * 1024 ** (_POWERS[letter.upper()] if letter else 0)


def parse_duration(value: object) -> object:
    """Reads `300`, `"30s"`, `"5m"` or `"2h"` as seconds; null and negative mean for ever."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            msg = "a duration is a number of seconds, or a number followed by s, m, h or d"
            raise ValueError(msg)
        value = float(match.group(1)) * _SECONDS[match.group(2).lower() or "s"]
    if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
        return None
    return value


Seconds = Annotated[float, Field(ge=0, le=10**9, allow_inf_nan=False)]
KeepAlive = Annotated[Seconds | None, BeforeValidator(parse_duration)]
Deadline = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]  # seconds
Bytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]

SharingPolicy = Literal["budget", "thresholds", "bytes", "exact"]
POLICIES: tuple[str, ...] = get_args(SharingPolicy)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HttpSettings(_Section):
    """Where the server listens and how much work it takes."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    no_auth: bool = False  # must be said to listen on more than the loopback interface
    strict: bool = False  # exit when a start-up model fails
    drain_s: float = Field(default=30, ge=0, le=3600)  # what running streams get at shutdown
    header_timeout_s: float = Field(default=10, gt=0, le=3600)  # what a request's head may take
    body_timeout_s: float = Field(default=60, gt=0, le=3600)  # what its body may take
    idle_timeout_s: float = Field(default=75, gt=0, le=3600)  # until an unused connection is closed
    # An answer that its client takes nothing of for so long is cut off.
    send_timeout_s: float = Field(default=30, gt=0, le=3600)
    queue_timeout_s: Deadline = 120  # what a sequence may wait for its first step
    first_token_timeout_s: Deadline = 300  # from its admission
    stall_timeout_s: Deadline = 120  # between two tokens
    total_timeout_s: Deadline = 3600  # from the arrival of a request to the end of its answer
    max_connections: int = Field(default=2048, ge=1, le=65536)
    max_connections_per_address: int = Field(default=1024, ge=1, le=65536)
    max_header_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=1024)] = 32 * 1024
    max_body_bytes: Bytes = 2 * 1024**2
    max_inflight: int = Field(default=256, ge=1, le=65536)  # sequences waiting or running
    # Tokens of prompts whose answers have not begun.
    max_waiting_prompt_tokens: int = Field(default=262_144, ge=1, le=2**30)
    # Names that requests may call the server by, beside the loopback's own. None of them: on the
    # loopback only those, elsewhere any.
    allowed_hosts: tuple[Annotated[str, Field(pattern=_ALLOWED_HOST)], ...] = ()


class StorageSettings(_Section):
    """Where the registry and compressed variants live."""

    state: Path | None = None  # None: $XDG_DATA_HOME/linker-llm
    registry_url: str | None = None  # None: SQLite inside `state`


class StartupModel(_Section):
    """A model to serve from the start."""

    name: str
    path: Path  # or hub:ORG/NAME@REVISION

    @property
    def is_on_hub(self) -> bool:
        """Whether it is downloaded."""
        return str(self.path).startswith(HUB_SCHEME)

    @property
    def source(self) -> str:
        """The directory, or what is downloaded."""
        return str(self.path if self.is_on_hub else self.path.resolve())


class ModelSettings(_Section):
    """Which checkpoints may be served."""

    root: Path | None = None  # sources of POST /models must lie here
    serve: tuple[StartupModel, ...] = ()  # the first is the donor of the others
    onboarding_queue: int = Field(default=16, ge=1, le=1024)  # jobs waiting or running
    keep_alive: KeepAlive = None  # idle time until a model is evicted; None: for ever
    load_timeout_s: float = Field(default=60, gt=0, le=3600)  # what a request waits for its model
    load_queue: int = Field(default=64, ge=1, le=4096)  # requests that wait for models at once


class HubSettings(_Section):
    """Where `hub:` sources are downloaded from."""

    endpoint: Annotated[str, Field(pattern=_ENDPOINT)] | None = None  # None: huggingface.co
    # Hosts, and those below them, that files may be redirected to. None: the public hub's, or none
    # beside another endpoint.
    stores: tuple[Annotated[str, Field(pattern=_HOST)], ...] | None = None
    max_bytes: Bytes | None = None  # of one download; None: what the disk has
    keep_free_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=0)] = 1024**3  # of disk
    downloads: int = Field(default=2, ge=1, le=16)  # at once
    stall_timeout_s: float = Field(default=30, gt=0, le=3600)  # below 1024 bytes a second


class SharingSettings(_Section):
    """How plans are made where a request does not say."""

    policy: SharingPolicy | None = None  # None: what the options below mean, else budget
    budget_kl: AtLeastZero | None = None  # None: 0.01 under budget, unmeasured under thresholds
    max_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=0)] | None = None
    tau_cos: Fraction | None = None
    tau_frob: AtLeastZero | None = None
    tier: str | None = None
    calibration: str | None = None  # None: shipped dialogues; "self"; or a file of JSON lines


class EngineSettings(_Section):
    """The engine process."""

    device: Literal["cpu", "cuda"] = "cpu"
    memory_budget: Bytes | None = None  # weights and KV pages together
    max_model_len: int | None = Field(default=None, ge=1, le=2**24)
    kv_cache_tokens: int = Field(default=16_384, ge=16, le=2**30)
    page_tokens: Literal[1, 2, 4, 8, 16, 32, 64, 128, 256] = 16
    max_batch_tokens: int = Field(default=256, ge=1, le=65536)
    max_num_seqs: int = Field(default=64, ge=1, le=4096)
    matmul_precision: MatmulPrecision = "highest"

    def to_engine_config(self) -> EngineConfig:
        """Returns what the engine process is told."""
        return EngineConfig(
            device=self.device,
            memory_budget_bytes=self.memory_budget,
            kv_cache_tokens=self.kv_cache_tokens,
            page_tokens=self.page_tokens,
            max_batch_tokens=self.max_batch_tokens,
            max_num_seqs=self.max_num_seqs,
            matmul_precision=self.matmul_precision,
        )


def _collector(value: str) -> str:
    if re.fullmatch(_ENDPOINT, value) is None:
        msg = "an address has to begin with http:// or https://, and has neither user nor query"
        raise ValueError(msg)
    return value


class TelemetrySettings(_Section):
    """Spans for an OpenTelemetry collector; they need the extra `otel`."""

    otlp_endpoint: Annotated[str, AfterValidator(_collector)] | None = None  # None: no spans
    sample_ratio: Fraction = 1.0  # of the requests, and of those that a sampled trace sends


class AnalysisSettings(_Section):
    """Studies of families' weights beside the server."""

    enabled: bool = True
    # How long a family's models, and jobs, are left alone before its study begins.
    settle_s: float = Field(default=30, ge=0, le=86400)


class Settings(_Section):
    """The whole tree."""

    http: HttpSettings = HttpSettings()
    storage: StorageSettings = StorageSettings()
    models: ModelSettings = ModelSettings()
    hub: HubSettings = HubSettings()
    sharing: SharingSettings = SharingSettings()
    engine: EngineSettings = EngineSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    analysis: AnalysisSettings = AnalysisSettings()

    def state_directory(self) -> Path:
        """Returns where the registry and compressed variants are kept."""
        if self.storage.state is not None:
            return self.storage.state
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return Path(data) / "linker-llm"

    def deltas_directory(self) -> Path:
        """Returns where compressed variants are kept."""
        return self.state_directory() / "deltas"

    def hub_directory(self) -> Path:
        """Returns where downloads are kept."""
        return self.state_directory() / "hub"

    def registry_url(self) -> str:
        """Returns the SQLAlchemy URL of the registry."""
        if self.storage.registry_url is not None:
            return self.storage.registry_url
        return f"sqlite:///{self.state_directory() / 'registry.sqlite3'}"


def load_settings(path: Path | None, overrides: Mapping[str, Mapping[str, object]]) -> Settings:
    """Builds the settings from a YAML file (or none) and the values given as flags.

    Args:
        path: A YAML file, or None for the defaults.
        overrides: Section -> key -> value; these win over the file.

    Raises:
        InvalidRequestError: A file that cannot be read, an unknown key or a value out of range; the
            message names file, key and value.
    """
    tree = {} if path is None else _read(path)
    for section, values in overrides.items():
        if values:
            tree[section] = {**_mapping(tree.get(section), path, section), **values}
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        msg = f"{path or 'command line'}: {explain(first, Settings)}"
        key = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(msg, param=key) from None


def _read(path: Path) -> dict[str, object]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidRequestError(f"{path}: there is no such file", param="config") from error
    except yaml.YAMLError as error:
        msg = f"{path}: this is no YAML{_place(error)}; correct it"
        raise InvalidRequestError(msg, param="config") from error
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: not a readable YAML file ({type(error).__name__}); check what it is"
        raise InvalidRequestError(msg, param="config") from error
    return _mapping(tree, path, "the file")


def _place(error: yaml.YAMLError) -> str:
    """Returns where a file goes wrong and how, as far as the parser knows."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ""
    mark = error.problem_mark
    return f" from line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _mapping(tree: object, path: Path | None, what: str) -> dict[str, object]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        msg = f"{path}: {what} must be a mapping of keys to values"
        raise InvalidRequestError(msg, param="config")
    return {str(key): value for key, value in tree.items()}
