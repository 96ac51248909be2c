"""Asks the hub: what a revision is, which files it has, and for their bytes. Blocking.

`huggingface_hub` knows the hub's addresses, answers and errors; its requests go through ours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, hf_hub_url, set_client_factory
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from linker_core.errors import BadCheckpointError, InvalidRequestError, LinkerError, NotReadyError
from server.onboarding.hub.limits import LEAST_BYTES_PER_S, HubLimits
from server.onboarding.hub.listing import HubFile
from server.onboarding.hub.source import HubSource
from server.onboarding.hub.stall import StallWatch
from server.onboarding.hub.transport import MAX_BYTES, GuardedTransport

_log = logging.getLogger(__name__)

_AGENT = "linker-llm"
_MAX_TRIES = 5  # that together bring less than a stall would have to
_HURRIED_TRIES = 2
_MAX_REDIRECTS = 5
_LONGEST_WAIT_S = 60.0  # between two tries; who asks for more is asked again by the user
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_T = TypeVar("_T")


class HubClient:
    """One hub, asked by one process. Sets what `huggingface_hub` asks with in all of it.

    Args:
        limits: Whom it may ask, and how long it waits.
        token: Shown to the endpoint and to nobody else; None: asked as a stranger.
        is_hurried: Somebody waits for the answer, so little is tried again.
    """

    def __init__(self, limits: HubLimits, token: str | None, *, is_hurried: bool) -> None:
        self._max_tries = _HURRIED_TRIES if is_hurried else _MAX_TRIES
        self._limits = limits
        self._token = token or False  # False: huggingface_hub looks for none in its own places
        self._least_gain_bytes = limits.stall_timeout_s * LEAST_BYTES_PER_S
        self._watch = StallWatch(limits.stall_timeout_s)
        self._endpoint = limits.endpoint.rstrip("/")
        set_client_factory(lambda: self._session(follows_to_stores=False))
        self._api = HfApi(endpoint=self._endpoint, token=self._token, library_name=_AGENT)
        self._files = self._session(follows_to_stores=True)

    def describe(self, source: HubSource) -> ModelInfo:
        """Returns what the hub says of a revision: its commit and its files.

        Raises:
            InvalidRequestError: There is none, or the token does not open it.
            BadCheckpointError: The hub's answer makes no sense.
            NotReadyError: The hub cannot be asked now.
        """

        def ask() -> ModelInfo:
            return self._api.model_info(
                source.repo, revision=source.revision, files_metadata=True, token=self._token
            )

        try:
            info = self.persistently(ask, source)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise BadCheckpointError(
                "The hub's answer is none that a hub gives. Check hub.endpoint."
            ) from error
        commit = HubSource(repo=source.repo, revision=str(info.sha))
        if not commit.is_pinned or (source.is_pinned and commit != source) or not info.siblings:
            raise BadCheckpointError(
                "The hub names no files, or another commit than it was asked for. Check "
                "hub.endpoint."
            )
        return info

    @contextmanager
    def opened(self, source: HubSource, file: HubFile, *, start: int) -> Iterator[httpx2.Response]:
        """Asks for a file's bytes from `start` on; the answer's may begin at 0 all the same.

        Raises:
            httpx2.HTTPError: The hub refuses, or the network failed.
            LinkerError: The hub may not be followed where it leads, or stands still.
        """
        url = hf_hub_url(source.repo, file.name, revision=source.revision, endpoint=self._endpoint)
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        if start:
            headers["range"] = f"bytes={start}-"
        extensions = {MAX_BYTES: file.nbytes}
        with self._files.stream("GET", url, headers=headers, extensions=extensions) as response:
            response.raise_for_status()
            yield response

    def persistently(
        self, attempt: Callable[[], _T], source: HubSource, *, gained: Callable[[], int] = int
    ) -> _T:
        """Tries until it works, the hub refuses, or several tries brought next to nothing.

        Args:
            attempt: What to try.
            source: What it is about.
            gained: Bytes that are there by now; tries that brought many were not in vain.

        Raises:
            LinkerError: Why it does not work.
        """
        tries, had = 0, gained()
        while True:
            self._check_online()
            try:
                with self._watch.watching():
                    return attempt()
            except (HfHubHTTPError, httpx2.HTTPStatusError) as error:
                failure, wait_s = _refusal(error, source), _asked_wait_s(error.response)
            except httpx2.RequestError as error:
                kind = type(error).__name__
                failure = NotReadyError(f"The hub cannot be reached ({kind}). Try again later.")
                wait_s = None
            if not isinstance(failure, NotReadyError):
                raise failure
            is_progress = gained() - had >= self._least_gain_bytes
            tries, had = (0, gained()) if is_progress else (tries + 1, had)
            wait_s = self._limits.retry_wait_s * 2**tries if wait_s is None else wait_s
            if tries >= self._max_tries or wait_s > _LONGEST_WAIT_S:
                raise failure
            _log.warning("%s Trying again in %g s.", failure.message, wait_s)
            time.sleep(wait_s)

    def close(self) -> None:
        """Closes the connections that files came over."""
        self._files.close()

    def _session(self, *, follows_to_stores: bool) -> httpx2.Client:
        transport = GuardedTransport(
            self._limits, follows_to_stores=follows_to_stores, on_bytes=self._watch.on_bytes
        )
        return httpx2.Client(
            transport=transport,
            headers={"user-agent": _AGENT},
            timeout=self._limits.stall_timeout_s,
            follow_redirects=True,
            max_redirects=_MAX_REDIRECTS,
            trust_env=False,
        )

    def _check_online(self) -> None:
        if is_offline_mode():
            raise NotReadyError("HF_HUB_OFFLINE is set, so no hub is asked. Unset it to download.")


def _asked_wait_s(response: httpx2.Response) -> float | None:
    after = response.headers.get("retry-after", "")
    return float(after) if after.isdecimal() and len(after) < 10 else None


def _refusal(error: HfHubHTTPError | httpx2.HTTPStatusError, source: HubSource) -> LinkerError:
    """Returns what a hub's refusal means for whoever named the source."""
    status = error.response.status_code
    if status in _PASSING:
        return NotReadyError(f"The hub answered with status {status}. Try again later.")
    if isinstance(error, RevisionNotFoundError):
        return InvalidRequestError(
            f"The repository {source.repo} has no revision {source.revision}.", param="source"
        )
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return InvalidRequestError(
            f"The hub shows no repository {source.repo}: it does not exist, or it is private or "
            "gated and HF_TOKEN is not set to a token that opens it.",
            param="source",
        )
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return BadCheckpointError("The hub has less of a file than it lists. Try again.")
    return InvalidRequestError(
        f"The hub refused a file or revision of {source.repo} with status {status}.",
        param="source",
    )


def headers_start(response: httpx2.Response) -> int:
    """Returns where in its file a body begins, by its headers."""
    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
        return 0
    said: Any = response.headers.get("content-range", "")
    unit, _, place = said.partition(" ")
    first = place.partition("-")[0]
    if unit.lower() != "bytes" or not first.isdecimal():
        raise BadCheckpointError("The hub sends a part of a file and does not say which.")
    return int(first)
