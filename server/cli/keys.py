"""`linker keys`: makes, lists and revokes API keys. A running server notices within two seconds."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.engine import URL

from linker_core.errors import ConflictError, InvalidRequestError, ModelNotFoundError
from server.registry.database import parse_url, registry_exists
from server.registry.keys import MAX_KEYS, MadeKey, digest_of, make_key
from server.registry.lock import make_state
from server.registry.records import KeyRecord, Role
from server.registry.store import Registry
from server.settings import load_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key and print it, this once")
    create.add_argument("name", help="to know the key by")
    create.add_argument(
        "--role",
        choices=[role.value for role in Role],
        default=Role.CLIENT.value,
        help="client: /v1, tokenisation (default); admin: everything; metrics: looks on, and "
        "changes nothing",
    )
    create.add_argument("--requests-per-minute", type=int, metavar="N")
    create.add_argument("--tokens-per-minute", type=int, metavar="N", help="prompts and answers")
    create.add_argument("--max-parallel", type=int, metavar="N", help="sequences at once")
    create.add_argument(
        "--file",
        type=Path,
        help="write the key there, for nobody else to read, instead of printing it; where the "
        "file has the key of that name already, nothing changes, and another one is revoked",
    )
    listing = actions.add_parser("list", help="show every key but the keys themselves")
    revoke = actions.add_parser("revoke", help="end a key")
    revoke.add_argument("key", help="its id, or its name")
    for action in (create, listing, revoke):
        action.add_argument("--config", type=Path, help="the server's YAML file of settings")
        action.add_argument("--state", type=Path, help="the server's state directory")


def run(args: argparse.Namespace) -> int:
    """Does it; the key that is made is all that stdout gets of `create`."""
    storage = {} if args.state is None else {"state": args.state}
    settings = load_settings(args.config, {"storage": storage})
    url = parse_url(settings.registry_url())
    is_new = not registry_exists(url)
    if is_new and args.action != "create":
        raise InvalidRequestError(
            f"There is no registry {_shown(url)}. Name the server's --state or --config; `linker "
            "serve` and `linker keys create` make a registry.",
            param="state",
        )
    make_state(settings.state_directory())
    with contextlib.closing(Registry.open_beside(url)) as registry:
        if args.action == "create":
            _create(registry, args)
            print(f"in the {'new ' * is_new}registry {_shown(url)}", file=sys.stderr)
        elif args.action == "list":
            for line in _table(registry.api_keys()):
                print(line)
        else:
            revoked = _good(registry.api_keys(), args.key)
            registry.save(replace(revoked, revoked_at=time.time()))
            _tell_revoked(revoked)
    return 0


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)


def _create(registry: Registry, args: argparse.Namespace) -> None:
    known = registry.api_keys()
    good = [key for key in known if key.revoked_at is None]
    namesake = next((key for key in good if key.name == args.name), None)
    if namesake is not None and args.file is None:
        raise ConflictError(
            f"There is a key named {args.name!r} ({namesake.id}); revoke it first, or choose "
            "another name."
        )
    if namesake is not None and _holds(args.file, namesake):
        print(f"kept {namesake.id} ({namesake.name}) in {args.file}", file=sys.stderr)
        return
    if len(good) >= MAX_KEYS:
        raise InvalidRequestError(f"There are {MAX_KEYS} keys; revoke some of them first.")
    made = _made(args)
    if args.file is not None:
        _write(args.file, made.key)
    else:
        print(made.key)
    # After it has been handed out: a key that nobody has would have to be revoked.
    gone = [] if namesake is None else [replace(namesake, revoked_at=time.time())]
    registry.save(made.record, *gone)
    where = "shown once" if args.file is None else f"in {args.file}"
    record = made.record
    print(f"made {record.id} ({record.name}, {record.role.value}), {where}", file=sys.stderr)
    for key in gone:
        _tell_revoked(key)
    if not known:
        print(_closing(record.role), file=sys.stderr)


def _closing(role: Role) -> str:
    """Returns what a registry's first key means for a server that was open until then."""
    closed = "the first key: from now on every request to this registry's server needs one"
    if role is Role.ADMIN:
        return closed
    return f"{closed}, and this one is no admin's; `linker keys create NAME --role admin` makes one"


def _tell_revoked(key: KeyRecord) -> None:
    print(f"revoked {key.id} ({key.name})", file=sys.stderr)


def _made(args: argparse.Namespace) -> MadeKey:
    return make_key(
        args.name,
        Role(args.role),
        created_at=time.time(),
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        max_parallel=args.max_parallel,
    )


def _holds(path: Path, key: KeyRecord) -> bool:
    """Whether a file has the very key of a record."""
    try:
        return digest_of(path.read_text(encoding="utf-8").strip()) == key.digest
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _write(path: Path, key: str) -> None:
    """Writes a key for its owner alone to read; whoever looks sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{key}\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InvalidRequestError(
            f"The key cannot be written to {path}: {error.strerror}.", param="file"
        ) from error


def _good(keys: Sequence[KeyRecord], wanted: str) -> KeyRecord:
    """Returns the key of an id or a name.

    Raises:
        ModelNotFoundError: There is none that is good.
        ConflictError: There are several of that name.
    """
    good = [key for key in keys if key.revoked_at is None and wanted in (key.id, key.name)]
    if not good:
        raise ModelNotFoundError("There is no such key, or it is revoked; see `linker keys list`.")
    if len(good) > 1:
        ids = ", ".join(key.id for key in good)
        raise ConflictError(f"There are several keys of that name; say which: {ids}.")
    return good[0]


def _table(keys: Sequence[KeyRecord]) -> Iterator[str]:
    head = ("ID", "NAME", "ROLE", "KEY", "REQ/MIN", "TOK/MIN", "PARALLEL", "MADE", "REVOKED")
    rows = [head, *map(_row, keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _row(key: KeyRecord) -> tuple[str, ...]:
    limits = (key.requests_per_minute, key.tokens_per_minute, key.max_parallel)
    shown = ("-" if limit is None else str(limit) for limit in limits)
    revoked = "-" if key.revoked_at is None else _day(key.revoked_at)
    return (
        key.id, key.name, key.role.value, f"{key.prefix}…", *shown, _day(key.created_at), revoked,
    )  # fmt: skip


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
