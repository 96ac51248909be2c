"""Watches a page for what a test does not look at: errors, refused and foreign requests."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from playwright.sync_api import ConsoleMessage, Error, Page, Request, Response

# A response's status is judged by itself, so the console's word for it says nothing new.
_STATUS_IN_CONSOLE = re.compile(r"Failed to load resource: (the server responded|net::ERR_)")
_QUIET = frozenset({"log", "info", "debug", "startGroup", "startGroupCollapsed", "endGroup"})
# Streams that the page itself ends, and everything that is under way when it is closed.
_ABORTED = "net::ERR_ABORTED"
# The console does not say where; this does.
TELL_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) => console.error(
  `content security policy: ${event.effectiveDirective} ${event.blockedURI} `
  + `${event.sourceFile}:${event.lineNumber} ${event.sample}`));
"""


class Watch:
    """Collects the troubles of one page.

    Args:
        page: Which; it has not been anywhere yet.
        origin: Of the one server that it may ask.
    """

    def __init__(self, page: Page, origin: str) -> None:
        self.troubles: list[str] = []
        self._requests: list[Request] = []
        self._origin = origin
        self._forgiven: list[tuple[int | None, re.Pattern[str]]] = []
        page.add_init_script(TELL_VIOLATIONS)
        page.on("console", self._on_console)
        page.on("pageerror", self._on_error)
        page.on("request", self._on_request)
        page.on("requestfailed", self._on_failed)
        page.on("response", self._on_response)

    def forgive(self, path: str, status: int | None) -> None:
        """Expects answers of a status to paths that match, or broken connections where it is None.

        Say so before it happens.
        """
        self._forgiven.append((status, re.compile(path)))

    def requests(self, path: str = ".*") -> list[Request]:
        """Returns what was asked for at paths that match, in its order."""
        asked = self._requests
        return [each for each in asked if re.fullmatch(path, urlsplit(each.url).path)]

    def _forgives(self, url: str, status: int | None) -> bool:
        path = urlsplit(url).path
        return any(s == status and pattern.fullmatch(path) for s, pattern in self._forgiven)

    def _tell(self, trouble: str) -> None:
        if trouble not in self.troubles:  # a library says the same hundreds of times
            self.troubles.append(trouble)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type not in _QUIET and not _STATUS_IN_CONSOLE.match(message.text):
            where = message.location
            self._tell(f"console {message.type}: {message.text[:400]} ({where})")

    def _on_error(self, error: Error) -> None:
        self._tell(f"uncaught: {error.stack or error.message}")

    def _on_request(self, request: Request) -> None:
        self._requests.append(request)
        if not request.url.startswith((f"{self._origin}/", "data:")):
            self._tell(f"asked elsewhere: {request.method} {request.url[:200]}")

    def _on_failed(self, request: Request) -> None:
        if request.failure != _ABORTED and not self._forgives(request.url, None):
            self._tell(f"failed: {request.method} {request.url} {request.failure}")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400 and not self._forgives(response.url, response.status):
            self._tell(f"{response.status}: {response.request.method} {response.url}")
