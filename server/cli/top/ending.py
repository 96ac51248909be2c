"""How a person ends what fills a terminal: Ctrl-C, SIGTERM, or q, and everything is as before."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_QUIT = b"q"


@contextmanager
def until_told(*, by_key: bool) -> Iterator[asyncio.Event]:
    """Yields an event that is set once it is to end. Event loop of the main thread only.

    Args:
        by_key: Whether q counts, where there is a keyboard; nothing typed is shown meanwhile.
    """
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in _SIGNALS:
        loop.add_signal_handler(number, told.set)
    try:
        if by_key and sys.stdin.isatty():
            with _keyboard(told):
                yield told
        else:
            yield told
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


@contextmanager
def _keyboard(told: asyncio.Event) -> Iterator[None]:
    loop, keyboard = asyncio.get_running_loop(), sys.stdin.fileno()

    def on_key() -> None:
        typed = os.read(keyboard, 64)
        if _QUIT in typed.lower():
            told.set()
        elif not typed:  # the terminal is gone, and would be readable for ever
            loop.remove_reader(keyboard)

    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, on_key)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
