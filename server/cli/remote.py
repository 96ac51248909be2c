"""How commands speak of a server that they ask over HTTP, where it does not answer or refuses."""

from __future__ import annotations

import argparse
import os

import httpx

from linker_core.errors import InvalidRequestError, LinkerError, from_record

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "LINKER_API_KEY"


class NoServerError(InvalidRequestError):
    """Nobody listens there, or what listens hung up."""


def add_server_arguments(parser: argparse.ArgumentParser, *, role: str) -> None:
    """Declares how a server is named, and the key that it may want.

    Args:
        parser: Of the command.
        role: Whose key it takes.
    """
    parser.add_argument("--url", type=_url, default=DEFAULT_URL, help="of the running server")
    parser.add_argument(
        "--key", help=f"of {role}; or in {KEY_VARIABLE}, which no process list shows"
    )


def key_of(args: argparse.Namespace) -> str | None:
    """Returns the key that was given, None without one."""
    key: str | None = args.key or os.environ.get(KEY_VARIABLE)
    return key


def key_headers(key: str | None) -> dict[str, str]:
    """Returns what a request says of its key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def no_server(url: str, error: httpx.TransportError) -> NoServerError:
    """Returns what is said where no answer comes."""
    return NoServerError(
        f"There is no server at {url} ({error}). Start one with linker serve, or name it with "
        "--url.",
        param="url",
    )


def refusal(url: str, response: httpx.Response) -> LinkerError:
    """Returns the error that a response is, whose body has been read."""
    try:
        said = response.json()
    except ValueError:
        said = None
    match said:
        case {"error": {"code": str(), "message": str()} as record}:
            return from_record(record)
    asked = f"{response.request.method} {response.request.url.path}"
    return InvalidRequestError(
        f"{url} answered {response.status_code} to {asked}, which a linker server does not. "
        "Check --url.",
        param="url",
    )


def _url(text: str) -> str:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no URL ({error})") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with http:// and a host")
    return text
