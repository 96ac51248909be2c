"""What a download may take, as the server tells its worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from server.settings import HubSettings

PUBLIC_ENDPOINT = "https://huggingface.co"
# Where the public hub keeps what is in its repositories: these hosts and those below them.
_PUBLIC_STORES = ("hf.co", "huggingface.co")
LEAST_BYTES_PER_S = 1024  # what is slower stands still


@dataclass(frozen=True, slots=True, kw_only=True)
class HubLimits:
    """Whom a worker may ask, and how much it may take from them."""

    endpoint: str
    is_public: bool  # the endpoint is the default, so its names have to mean public addresses
    stores: tuple[str, ...]  # hosts, and those below them, that files may be redirected to
    are_stores_public: bool
    max_bytes: int | None  # of one download
    keep_free_bytes: int  # of the disk
    stall_timeout_s: float
    retry_wait_s: float  # before the first retry; doubles

    @classmethod
    def of(cls, settings: HubSettings, *, retry_wait_s: float) -> Self:
        """Returns the limits that settings state."""
        endpoint = (settings.endpoint or PUBLIC_ENDPOINT).rstrip("/")
        stores = settings.stores
        if stores is None:
            stores = _PUBLIC_STORES if endpoint == PUBLIC_ENDPOINT else ()
        return cls(
            endpoint=endpoint,
            is_public=settings.endpoint is None,
            stores=stores,
            are_stores_public=settings.stores is None,
            max_bytes=settings.max_bytes,
            keep_free_bytes=settings.keep_free_bytes,
            stall_timeout_s=settings.stall_timeout_s,
            retry_wait_s=retry_wait_s,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the limits as a plain record."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds limits from `to_json`."""
        return cls(**{**record, "stores": tuple(record["stores"])})
