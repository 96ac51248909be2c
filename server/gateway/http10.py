"""Answers to clients of HTTP/1.0, which know no chunks (RFC 9112, section 6.1). Knows no model."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def until_close(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """Returns the application with answers of no known length ended by their connection's end.

    Args:
        cycle: The request that the application is to answer.
        app: The application.
    """

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = True

        async def send_plain(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", ())}
                has_length = b"content-length" in names
                if not has_length:
                    cycle.chunked_encoding = False
            elif not has_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        cycle.keep_alive = False
        await app(scope, receive, send_plain)

    return answering
