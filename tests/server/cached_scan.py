"""The scan worker with a memory: the same bytes are scanned once per test session.

Importing numba a hundred times would be most of these tests' time. Only the standard library is
imported here; what is not remembered is asked of the real worker.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

CACHED_SCAN = (sys.executable, __file__)
CACHE_VARIABLE = "LINKER_TEST_SCANS"
WORKER = (sys.executable, "-m", "linker_core.sharing.worker")


def main() -> int:
    arguments = sys.argv[1:]
    digest = hashlib.sha256()
    for argument in arguments:
        path = Path(argument)
        files = sorted(path.iterdir()) if path.is_dir() else []
        digest.update(b"" if files else argument.encode())
        for file in files:
            if file.suffix in (".json", ".safetensors"):
                digest.update(file.name.encode() + file.read_bytes())
    remembered = Path(os.environ[CACHE_VARIABLE], digest.hexdigest())
    if not remembered.exists():
        done = subprocess.run([*WORKER, *arguments], stdout=subprocess.PIPE, check=False)
        if done.returncode:
            sys.stdout.buffer.write(done.stdout)
            return done.returncode
        remembered.write_bytes(done.stdout)
    sys.stdout.buffer.write(remembered.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
