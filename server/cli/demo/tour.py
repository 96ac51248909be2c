"""The tour: onboards the family over HTTP and asks each model something. Knows no weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from linker_core.errors import LinkerError
from server.cli.demo.recipes import MODELS

DONOR: Final = MODELS[0]
MAX_ANSWER_TOKENS: Final = 40
_POLL_S: Final = 0.1

OnStage = Callable[[str, str, int, int], None]  # model, stage, bytes done, bytes in all
IsAlive = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a model is asked: a text to go on with, or a user's turn."""

    text: str
    is_chat: bool


QUESTIONS: Final[Mapping[str, Question]] = {
    "base": Question(text="Return a", is_chat=False),
    "instruct": Question(text="What is textwrap.dedent?", is_chat=True),
    "chat": Question(text="Hi! Tell me about textwrap.dedent.", is_chat=True),
    "code": Question(text="    if not isinstance(", is_chat=False),
}


def request_body(name: str) -> dict[str, Any]:
    """Returns what asks a model its question, for a greedy answer."""
    question = QUESTIONS[name]
    if question.is_chat:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": question.text}]}
    else:
        asked = {"prompt": question.text}
    return {"model": name, **asked, "temperature": 0, "max_tokens": MAX_ANSWER_TOKENS}


class Tour:
    """Speaks to one running server as any client would."""

    def __init__(self, client: httpx.Client, is_alive: IsAlive) -> None:
        """Wraps a client.

        Args:
            client: Its base URL is the server's.
            is_alive: Says whether the server's process still runs; waiting ends when it does not.
        """
        self._client = client
        self._is_alive = is_alive

    def wait_until_up(self) -> None:
        """Returns once the server answers.

        Raises:
            LinkerError: It ended before it did.
        """
        while True:
            try:
                if self._client.get("/health").is_success:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            self._pause()

    def onboard(self, name: str, source: Path, on_stage: OnStage) -> bool:
        """Brings one model to `ready`, planned as the server plans by default.

        One that the server knows from before comes back by itself.

        Returns:
            Whether it is as this asks for it; false where its options have been changed since.

        Raises:
            LinkerError: The model failed, with the server's own reason.
        """
        body: dict[str, Any] = {"name": name, "source": str(source)}
        if name != DONOR:
            body["donor"] = DONOR
        job = self._post_model(body)
        if job is not None:
            self._follow(job, on_stage)
        while (record := self.describe(name))["state"] == "onboarding":
            on_stage(name, "coming back", 0, 0)
            self._pause()
        if record["state"] != "ready":
            reason = (record.get("error") or {}).get("message", record["state"])
            raise LinkerError(f"{name} cannot be served: {reason}")
        return job is not None

    def ask(self, name: str) -> str:
        """Returns a model's greedy answer to its question.

        Raises:
            LinkerError: The server refused.
        """
        body, is_chat = request_body(name), QUESTIONS[name].is_chat
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        choice = _checked(self._client.post(path, json=body)).json()["choices"][0]
        return str(choice["message"]["content"] if is_chat else choice["text"])

    def describe(self, name: str) -> Mapping[str, Any]:
        """Returns what `GET /models/{name}` says."""
        record: Mapping[str, Any] = _checked(self._client.get(f"/models/{name}")).json()
        return record

    def _post_model(self, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Returns the job; the same content posted again gives the job of the first time.

        None where the model is there with other options.
        """
        reply = self._client.post("/models", json=body)
        while reply.status_code == httpx.codes.SERVICE_UNAVAILABLE:  # the engine is starting
            self._pause()
            reply = self._client.post("/models", json=body)
        if reply.status_code == httpx.codes.CONFLICT:
            return None
        job: Mapping[str, Any] = _checked(reply).json()
        return job

    def _follow(self, job: Mapping[str, Any], on_stage: OnStage) -> None:
        while job["status"] in ("queued", "running"):
            progress = job.get("progress") or {}
            on_stage(
                job["model"],
                job.get("stage") or job["status"],
                progress.get("done_bytes") or 0,
                progress.get("total_bytes") or 0,
            )
            self._pause()
            job = _checked(self._client.get(f"/models/jobs/{job['id']}")).json()
        if job["status"] != "succeeded":
            reason = (job.get("error") or {}).get("message", job["status"])
            raise LinkerError(f"{job['model']} could not be onboarded: {reason}")

    def _pause(self) -> None:
        if not self._is_alive():
            raise LinkerError("the server ended before the tour did")
        time.sleep(_POLL_S)


def _checked(reply: httpx.Response) -> httpx.Response:
    if reply.is_success:
        return reply
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = reply.text[:200]
    raise LinkerError(f"{reply.request.method} {reply.request.url.path}: {message}")
