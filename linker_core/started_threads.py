"""Thread pools whose threads are all there from the start."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor


def started_threads(number: int, name: str) -> ThreadPoolExecutor:
    """Returns a pool that starts no thread any more.

    A pool starts its threads as work comes. On a machine that has reached its limit of processes by
    then, that work fails, of whatever kind it is, and takes with it what waits for it.

    Raises:
        RuntimeError: So many cannot be started now.
    """
    pool = ThreadPoolExecutor(number, thread_name_prefix=name)
    all_there = threading.Barrier(number + 1)
    try:
        for _ in range(number):
            pool.submit(all_there.wait)  # none of them is idle before the last has come
    except RuntimeError:
        all_there.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    all_there.wait()
    return pool
