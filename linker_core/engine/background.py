"""Work on a thread of its own while the loop goes on."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait

_LOOK_S = 0.002  # how long a look may hold the loop


def in_background(work: Callable[[], None]) -> Generator[None, None, None]:
    """Runs `work` on another thread and yields as long as it is not done.

    It goes on to its end if the iterator is closed early.

    Raises:
        Exception: Whatever `work` raises.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="background")
    running = executor.submit(work)
    executor.shutdown(wait=False)  # once it is done
    while wait([running], timeout=_LOOK_S).not_done:
        yield
    running.result()
