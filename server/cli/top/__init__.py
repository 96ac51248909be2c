"""`linker top`: what a running server shares, saves and does, in a terminal."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live

from server.cli.remote import add_server_arguments, key_of
from server.cli.top.ending import until_told
from server.cli.top.feed import Feed
from server.cli.top.fleet import Fleet
from server.cli.top.view import Frame

_PLAIN_WIDTH = 120  # where nobody says how wide it is
_SHORTEST_S = 0.1  # between two frames
_ONCE_S = 1.5  # for a second status, without which there is no rate; what is still sends none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_server_arguments(parser, role="an operator, or one of role metrics")
    parser.add_argument("--once", action="store_true", help="print what there is, once")
    parser.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="S", help="between two frames (1)"
    )


def run(args: argparse.Namespace) -> int:
    """Shows a server until it is told to end, by Ctrl-C or the key q.

    Raises:
        LinkerError: There is no server, or it does not let us watch.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of a terminal that knows but ASCII
    fills_screen = sys.stdout.isatty() and not args.once
    console = Console(width=None if sys.stdout.isatty() else _plain_width())
    asyncio.run(_watch(args, console, fills_screen=fills_screen and not console.is_dumb_terminal))
    return 0


async def _watch(args: argparse.Namespace, console: Console, *, fills_screen: bool) -> None:
    fleet = Fleet()
    feed = Feed(args.url, key_of(args), fleet)
    with until_told(by_key=fills_screen) as told:
        following, *waits = (
            asyncio.ensure_future(one)
            for one in (feed.run(), told.wait(), feed.begun.wait(), feed.compared.wait())
        )
        ending, begun, compared = waits
        try:
            await _first(following, ending, begun)
            if args.once:
                await _first(following, ending, compared, within_s=_ONCE_S)
            with _showing(console, args, fleet, fills_screen=fills_screen) as show:
                while not (following.done() or ending.done()):
                    show()
                    if args.once:
                        return
                    await _first(following, ending, within_s=args.interval)
            if following.done():
                await following  # says why
        finally:
            for task in (following, *waits):
                task.cancel()
            await asyncio.gather(following, *waits, return_exceptions=True)


async def _first(*awaited: asyncio.Future[Any], within_s: float | None = None) -> None:
    """Waits for one of several things, for so long at most."""
    await asyncio.wait(awaited, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)


@contextmanager
def _showing(
    console: Console, args: argparse.Namespace, fleet: Fleet, *, fills_screen: bool
) -> Iterator[Callable[[], None]]:
    """Yields what shows the fleet as it is: in a screen of its own, or else line after line."""

    def frame() -> Frame:
        return Frame(fleet=fleet, url=args.url, now_s=time.monotonic(), fits=fills_screen)

    def print_frame() -> None:
        with console.capture() as captured:
            console.print(frame())
        # Not by the console: it has a way of its own to end where nobody reads any more.
        print(captured.get(), end="", flush=True)

    if not fills_screen:
        yield print_frame
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda: live.update(frame(), refresh=True)


def _plain_width() -> int:
    """Returns how wide the frames are where the output is no terminal."""
    said = os.environ.get("COLUMNS", "")
    return int(said) if said.isdecimal() and int(said) > 0 else _PLAIN_WIDTH


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= _SHORTEST_S):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds that is {_SHORTEST_S} at least"
        )
    return seconds
