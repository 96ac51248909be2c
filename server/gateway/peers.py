"""Who is connected: how many connections there are, in all and of one address. Knows no HTTP."""

from __future__ import annotations

import ipaddress
from collections import Counter
from http import HTTPStatus

_BEYOND = 64  # connections that are told why, at most, before others are hung up on without a word
_V6_SITE_BITS = 64  # one customer has at least so many addresses


class Peers:
    """Counts connections. Event loop only; memory for those that are open alone.

    Args:
        limit: Connections in all.
        limit_each: Connections of one address, or of one IPv6 site.
    """

    def __init__(self, *, limit: int, limit_each: int) -> None:
        self.limit = limit
        self._limit_each = limit_each
        self._by_site: Counter[str] = Counter()
        self._total = 0

    def is_flooded_by(self, site: str) -> bool:
        """Whether there are too many even to be told why they are refused."""
        beyond = self._total - self.limit, self._by_site[site] - self._limit_each
        return max(beyond) > _BEYOND

    def __len__(self) -> int:
        return self._total

    def enter(self, site: str) -> HTTPStatus | None:
        """Counts a connection, which has to `leave`; returns why it is refused, if it is."""
        self._total += 1
        self._by_site[site] += 1
        if self._total > self.limit:
            return HTTPStatus.SERVICE_UNAVAILABLE
        if self._by_site[site] > self._limit_each:
            return HTTPStatus.TOO_MANY_REQUESTS
        return None

    def leave(self, site: str) -> None:
        """Forgets a connection."""
        self._total -= 1
        self._by_site[site] -= 1
        if not self._by_site[site]:
            del self._by_site[site]


def site_of(address: str | None) -> str:
    """Returns whom a connection is counted under: an IPv4 address, or the /64 of an IPv6 one."""
    if address is None:
        return ""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, _V6_SITE_BITS), strict=False))
