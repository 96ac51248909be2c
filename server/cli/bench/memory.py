"""What a process keeps in memory to itself, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def private_bytes(pid: int) -> int:
    """Returns the resident bytes of a process that no file backs; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line for line in lines if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) * 1024 if found else 0
