"""What an evaluation asks of a running server beside answers: models, and a place for scores."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import httpx

from server.cli.remote import key_headers, no_server, refusal
from server.gateway.schemas.generation import VariantMode

_TIMEOUT_S = 60.0


class Evaluated(NamedTuple):
    """The model, and what answers for it."""

    name: str
    base_url: str  # of its completions
    max_model_len: int
    plan: str  # its digest
    policy: str
    serves_own_weights: bool  # both modes answer alike


class Server:
    """A running server.

    Args:
        url: Where it listens.
        key: Of an operator; None: it asks for none.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/")
        headers = key_headers(key)
        self._client = httpx.Client(base_url=self._url, headers=headers, timeout=_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def find(self, name: str) -> Evaluated:
        """Returns a model that can be evaluated.

        Raises:
            LinkerError: The server is not there, refuses, or the model cannot be served.
        """
        served = self._ask("GET", f"/v1/models/{quote(name)}")
        card = self._ask("GET", f"/models/{quote(name)}")
        plan = card["plan"]
        return Evaluated(
            name=card["id"],
            base_url=f"{self._url}/m/{quote(card['id'])}/v1/completions",
            max_model_len=served["max_model_len"],
            plan=plan["digest"],
            policy=plan["policy"],
            serves_own_weights=plan["lossless"],
        )

    def store(self, model: Evaluated, mode: VariantMode, said: Mapping[str, Any]) -> None:
        """Stores scores beside the model's plan.

        Args:
            model: As found before it answered.
            mode: Whose weights did.
            said: `harness` and `tasks` as POST /models/scores takes them.

        Raises:
            LinkerError: The server is not there, or the model has another plan by now.
        """
        tasks = list(said["tasks"].items())
        for first in range(0, len(tasks), 100):
            body = {
                "model": model.name,
                "variant_mode": mode,
                "plan": model.plan,
                "harness": said["harness"],
                "tasks": dict(tasks[first : first + 100]),
            }
            self._ask("POST", "/models/scores", body)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise no_server(self._url, error) from error
        if not response.is_success:
            raise refusal(self._url, response)
        return response.json()
