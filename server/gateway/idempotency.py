"""The Idempotency-Key header: a request that is sent again is done once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from linker_core.errors import InvalidRequestError
from server.gateway.caller import caller_of
from server.onboarding.replays import Once

HEADER = "Idempotency-Key"
_KEY = re.compile(r"[!-~]{1,255}", re.ASCII)  # one word of visible characters


def once_of(request: Request, body: Mapping[str, Any]) -> Once | None:
    """Returns the key of a request with a digest of what it asks for; None without a key.

    Holders of different API keys cannot meet: what one has done is neither told to the other nor
    in its way.

    Args:
        request: Its method and path are part of what it asks for; its query is not.
        body: As parsed.

    Raises:
        InvalidRequestError: More than one key, or one that is empty, too long or not plain.
    """
    keys = request.headers.getlist(HEADER)
    if not keys:
        return None
    if len(keys) > 1 or _KEY.fullmatch(keys[0]) is None:
        raise InvalidRequestError(
            f"{HEADER} is one key of 1 to 255 visible ASCII characters.", param=HEADER
        )
    said = [request.method, request.scope["path"], body]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    caller = caller_of(request).key_id
    return Once(keys[0] if caller is None else f"{caller} {keys[0]}", digest)
