"""What stands between `huggingface_hub` and the network: whom it may reach, and with what.

Redirects, names and bodies come from others. A request goes to the configured endpoint, or as a
file's redirect to a store; the token goes to the endpoint alone; a name is resolved once and the
connection made to that address; nothing is decompressed, and no body is longer than was expected.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator

import httpx2

from linker_core.errors import BadCheckpointError, NotReadyError
from server.onboarding.hub.limits import HubLimits

MAX_BYTES = "linker_max_bytes"  # a request's extension: what its answer may hold
_MAX_ANSWER_BYTES = 16 << 20  # of answers that are no files
_PRIVATE_HEADERS = ("authorization", "cookie")
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is given out for public use
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # how networks of IPv6 alone write IPv4

OnBytes = Callable[[int], None]


class GuardedTransport(httpx2.BaseTransport):
    """Sends requests where they may go. For one thread.

    Args:
        limits: Whom may be asked.
        follows_to_stores: Whether requests may go to the stores, too.
        on_bytes: Hears of what arrives.
    """

    def __init__(self, limits: HubLimits, *, follows_to_stores: bool, on_bytes: OnBytes) -> None:
        self._endpoint = httpx2.URL(limits.endpoint)
        self._limits = limits
        self._stores = limits.stores if follows_to_stores else ()
        self._on_bytes = on_bytes
        # One for each host: connections are kept by address, and a certificate is one host's.
        self._transports: dict[str, httpx2.HTTPTransport] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Sends a request.

        Raises:
            BadCheckpointError: The hub redirects elsewhere, or compresses what it sends.
            NotReadyError: A name cannot be resolved, or leads into a private network.
        """
        url = request.url
        is_endpoint = _origin(url) == _origin(self._endpoint)
        if not is_endpoint:
            self._check_store(url)
            for header in _PRIVATE_HEADERS:
                request.headers.pop(header, None)
        request.headers["accept-encoding"] = "identity"
        limits = self._limits
        must_be_public = limits.is_public if is_endpoint else limits.are_stores_public
        addresses = resolve(url.host, _port(url), must_be_public=must_be_public)
        response = self._send(request, addresses)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            response.close()
            raise BadCheckpointError(
                "The hub sends compressed bodies, which are not accepted. Check hub.endpoint."
            )
        assert isinstance(response.stream, httpx2.SyncByteStream)
        max_bytes = request.extensions.get(MAX_BYTES, _MAX_ANSWER_BYTES)
        response.stream = _BoundedStream(response.stream, max_bytes, self._on_bytes)
        return response

    def close(self) -> None:
        """Closes all connections."""
        for transport in self._transports.values():
            transport.close()

    def _send(self, request: httpx2.Request, addresses: list[str]) -> httpx2.Response:
        """Sends a request to the first address that can be reached."""
        transport = self._transport(request.url.host)
        while True:
            sent = httpx2.Request(
                request.method,
                request.url.copy_with(host=addresses.pop(0)),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": request.url.host},
            )
            try:
                return transport.handle_request(sent)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if not addresses:
                    raise

    def _check_store(self, url: httpx2.URL) -> None:
        host = url.host.lower()
        is_store = any(host == store or host.endswith(f".{store}") for store in self._stores)
        # Where the endpoint speaks without TLS, its stores may.
        is_safe = url.scheme == "https" or url.scheme == self._endpoint.scheme
        if not is_store or not is_safe or url.userinfo:
            raise BadCheckpointError(
                "The hub redirects to a place that files are not taken from. If the place is "
                "right, add its host to hub.stores."
            )

    def _transport(self, host: str) -> httpx2.HTTPTransport:
        if host not in self._transports:
            self._transports[host] = httpx2.HTTPTransport(verify=_trusted())
        return self._transports[host]


class _BoundedStream(httpx2.SyncByteStream):
    """A body that may not be longer than was expected."""

    def __init__(self, stream: httpx2.SyncByteStream, max_bytes: int, on_bytes: OnBytes) -> None:
        self._stream = stream
        self._left_bytes = max_bytes
        self._on_bytes = on_bytes

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._left_bytes -= len(chunk)
            if self._left_bytes < 0:
                raise BadCheckpointError(
                    "The hub sends more bytes than the file has by its listing. Check "
                    "hub.endpoint, or choose another source."
                )
            self._on_bytes(len(chunk))
            yield chunk

    def close(self) -> None:
        self._stream.close()


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Returns whose certificates are believed; reading them takes longer than a small download."""
    return httpx2.create_ssl_context()


def resolve(host: str, port: int, *, must_be_public: bool) -> list[str]:
    """Returns the addresses of a host, the best first.

    Raises:
        NotReadyError: It has none, or one that is not public and must be. All have to be: what a
            name means may change between two looks.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter of parts that are empty or too long
        raise NotReadyError(
            "The hub's name cannot be resolved. Check the network and hub.endpoint, and try again."
        ) from error
    addresses = [str(entry[4][0]) for entry in found]
    if must_be_public and not all(_is_public(address) for address in addresses):
        raise NotReadyError(
            "The hub's name leads into a private network, where nothing is asked for. Set "
            "hub.endpoint if that is meant."
        )
    return addresses


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return _is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)))
        inner = ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        return ip in _UNICAST and ip.is_global and (inner is None or inner.is_global)
    return ip.is_global and not ip.is_multicast


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    return url.scheme, url.host.lower(), _port(url)


def _port(url: httpx2.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)
