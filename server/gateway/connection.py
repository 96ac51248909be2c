"""What uvicorn lacks: limits on what a connection may do.

A request has to arrive in time and in size, an answer has to be taken, and nobody may hold more
connections than there are for one. What breaks these rules gets an answer and is hung up on; it
never reaches the application. Knows no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from linker_core.errors import LinkerError, RateLimitError
from server.gateway.errors import error_response, http_error_code, http_error_response
from server.gateway.held_transport import HeldTransport
from server.gateway.http10 import until_close
from server.gateway.peers import site_of
from server.gateway.request_ids import HEADER, request_id_of
from server.gateway.send_deadline import SendDeadline
from server.gateway.server_config import ServerConfig
from server.settings import HttpSettings

_LINGER_S = 1.0  # for last words to be read before the connection is cut
# For requests to be refused that were sent as the server stopped: on connections that were used
# before, whose clients see that they are closed, and on those that were opened for the request.
_LAST_CALL_S, _FIRST_CALL_S = 0.25, 1.0
_MAX_HEADERS = 100
_MAX_PIPELINED = 16
_BODY_OVERHEAD = 8  # bytes on the wire for one of the body, at most: chunks of one byte take six
# asyncio asks for 256 KiB at a time, which the system maps anew each time: 14 us a piece.
_READ_BYTES = 64 * 1024


def server_config(
    app: ASGIApp,
    http: HttpSettings | None = None,
    *,
    on_refused: Callable[[str], None] = lambda _code: None,
) -> ServerConfig:
    """Returns how the application is served; binding is the caller's. See `ServerConfig`."""
    return ServerConfig(app, protocol=_Protocol, http=http or HttpSettings(), on_refused=on_refused)


class _Stage(Enum):
    """What of a request is being received."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()


class _BrokenRuleError(Exception):
    """A request goes beyond a limit; raised inside the parser's callbacks."""


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 within limits."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, ServerConfig)
        self._config = config
        self._limits = config.limits
        self._peers = config.peers
        self._on_refused = config.on_refused
        self.timeout_keep_alive = self._limits.idle_timeout_s  # type: ignore[assignment]
        self._site = ""
        self._refused_at_the_door: HTTPStatus | None = None
        self._is_lost = False
        self._ended = False  # nothing more is sent
        self._deaf = False  # what still comes is thrown away
        # Said once what is under way is answered.
        self._last_words: HTTPStatus | LinkerError | None = None
        self._broken_rule: HTTPStatus | LinkerError = HTTPStatus.BAD_REQUEST
        self._answering: RequestResponseCycle | None = None
        self._stage = _Stage.NOTHING
        self._timed: _Stage | None = None  # what the timer of receiving is for
        self._receiving: asyncio.TimerHandle | None = None
        self._cutting: asyncio.TimerHandle | None = None
        self._num_bytes = 0  # of the part that is being received, but for its first piece
        self._num_head_bytes = 0

    # --- the connection -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if hasattr(transport, "max_size"):
            transport.max_size = _READ_BYTES
        super().connection_made(cast(asyncio.Transport, transport))  # uvloop's is no subclass
        self._gate = HeldTransport(self.transport, self._close)
        self.transport = cast(asyncio.Transport, self._gate)
        self._sending = SendDeadline(self.loop, self.transport, self._limits.send_timeout_s)
        self._site = site_of(self.client[0] if self.client else None)
        self._refused_at_the_door = self._peers.enter(self._site)
        if self._peers.is_flooded_by(self._site):
            self.transport.abort()
            return
        self._time(_Stage.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._peers.leave(self._site)
        self._sending.lift()
        for timer in (self._receiving, self._cutting):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        if self._answering is not None:
            _leave(self._answering)  # another one than the cycle where requests are pipelined
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._refused_at_the_door is not None:
            self._refuse(self._refused_at_the_door)
            return
        before = self._stage
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(self._broken_rule)
            return
        if self._stage is before:
            self._num_bytes += len(data)
        self._check_size()
        if self._timed is None:
            self._time(self._stage)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser takes what follows for another protocol, and a body with it. Nobody has to
            # upgrade: the request is read again as if it had not been offered.
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(head + data[upgrade.args[0] :])

    # --- what is received ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        super().on_message_begin()
        self._enter(_Stage.HEAD)
        self._num_head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url), HTTPStatus.REQUEST_URI_TOO_LONG)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage is not _Stage.HEAD:
            return  # a trailer: whoever looks at headers has done so
        too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        self._count_head(len(name) + len(value) + 4, too_large)
        if len(self.headers) >= _MAX_HEADERS:
            self._break(too_large)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._break(_too_far_ahead())
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._break(HTTPStatus.BAD_REQUEST)
            return
        super().on_headers_complete()
        if self._config.is_winding_down:
            self.cycle.keep_alive = False
        self._enter(_Stage.BODY)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._enter(_Stage.NOTHING)

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip().lower() for token in value.split(b",")]
                lines += [b"connection: close"] if b"close" in tokens else []
            elif name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"\r\n"])

    def _enter(self, stage: _Stage) -> None:
        self._stage = stage
        self._num_bytes = 0
        self._timed = None

    def _count_head(self, num_bytes: int, status: HTTPStatus) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > self._limits.max_header_bytes:
            self._break(status)

    def _break(self, why: HTTPStatus | LinkerError) -> None:
        self._broken_rule = why
        raise _BrokenRuleError

    def _check_size(self) -> None:
        """Bounds what the parser says nothing of: endless headers, chunk sizes and trailers."""
        if self._stage is _Stage.HEAD and self._num_bytes > self._limits.max_header_bytes:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif (
            self._stage is _Stage.BODY
            and self._num_bytes > _BODY_OVERHEAD * self._limits.max_body_bytes
        ):
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)

    def _time(self, stage: _Stage) -> None:
        """Gives a part of a request its time, or none where nothing is received."""
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None
        self._timed = stage
        if stage is _Stage.NOTHING or self._deaf:
            return
        limits = self._limits
        time_s = limits.header_timeout_s if stage is _Stage.HEAD else limits.body_timeout_s
        self._receiving = self.loop.call_later(time_s, self._on_late)

    def _on_late(self) -> None:
        self._receiving = None
        if self.flow.read_paused:  # it waits for us
            self._time(self._stage)
        elif self._stage is _Stage.NOTHING:  # nothing has come at all
            self._cut_soon()
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    # --- what is refused ----------------------------------------------------------------------

    def _refuse(self, why: HTTPStatus | LinkerError) -> None:
        """Takes nothing more; says why once what came before is answered, and hangs up."""
        self._deaf, self._last_words = True, why
        self._time(_Stage.NOTHING)
        self._on_refused(why.code if isinstance(why, LinkerError) else http_error_code(why))
        cycle = self._answering
        if self._stage is _Stage.BODY:
            if self.pipeline:
                self.pipeline.popleft()  # the one that is being received; nobody has seen it
            else:
                assert cycle is not None
                _leave(cycle)
                if cycle.response_started:  # it has been answered already, wholly or in part
                    self._cut_soon()
                else:
                    self._say_last_words()
                return
        if cycle is None or cycle.response_complete:
            self._say_last_words()

    def _say_last_words(self) -> None:
        why = self._last_words
        assert why is not None
        if self._ended:
            return
        received = () if self._stage is _Stage.NOTHING else self.headers
        self._last_words = None
        self.transport.write(_refusal(why, received))
        self._cut_soon()

    def _say_goodbye(self) -> None:
        self._cutting = None
        if self._answering is None or self._answering.response_complete:
            self._cut_soon()

    def _cut_soon(self) -> None:
        """Ends our side; a close with unread input would take back what was written last."""
        self._deaf = True
        self.flow.resume_reading()  # so that it is seen to be thrown away
        if not self._ended:
            self._ended = True
            self.transport.write_eof()
        if self._cutting is None:
            self._cutting = self.loop.call_later(_LINGER_S, self._cut)

    def _cut(self) -> None:
        if not self.transport.get_write_buffer_size():
            self.transport.abort()
            return
        self._sending.set()
        self._cutting = self.loop.call_later(_LINGER_S, self._cut)

    def _close(self, close: Callable[[], None]) -> None:
        """Closes, but not under a request that is still coming: its answer would be lost."""
        if self._is_lost or self._ended or self._stage is _Stage.NOTHING:
            self._ended = True
            close()
            self._sending.set()
        else:
            self._cut_soon()

    # --- what is sent -------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        self._gate.expect_head()
        if cycle.scope["http_version"] < "1.1":
            app = until_close(cycle, app)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        assert self._answering is not None
        if self._last_words is not None and self._answering.response_complete:
            self._say_last_words()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending.set()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sending.lift()

    def shutdown(self) -> None:
        self._config.is_winding_down = True
        if self._answering is not None and not self._answering.response_complete:
            super().shutdown()
        elif self._cutting is None:
            # A request may be on its way: it would be lost with the connection, so it is refused.
            wait_s = _FIRST_CALL_S if self._answering is None else _LAST_CALL_S
            self._cutting = self.loop.call_later(wait_s, self._say_goodbye)


def _too_far_ahead() -> RateLimitError:
    return RateLimitError(
        f"At most {_MAX_PIPELINED} requests may wait on one connection for the answer before them; "
        "wait for answers, or use more connections.",
        retry_after_s=1,
    )


def _refusal(why: HTTPStatus | LinkerError, received: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Returns the whole answer to a request with these headers that nobody has seen."""
    response = error_response(why) if isinstance(why, LinkerError) else http_error_response(why)
    headers = [
        *response.raw_headers,
        (HEADER, request_id_of(received)),
        (b"connection", b"close"),
    ]
    lines = [b"%s: %s\r\n" % header for header in headers]
    status = HTTPStatus(response.status_code)
    status_line = b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode())
    return b"".join([status_line, *lines, b"\r\n", bytes(response.body)])


def _leave(cycle: RequestResponseCycle) -> None:
    """Tells the application that the client of a request has gone."""
    cycle.disconnected = not cycle.response_complete
    cycle.message_event.set()
