"""Every benchmark in one run: `make bench`. Figures go into docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

from tests.benchmarks import memory, scan

GB = 1e9


def main() -> None:
    """Makes a 400 MB family, then measures on it."""
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        models = memory.make_family(Path(folder))
        rates = scan.measure(models[0], models[1])
        print(
            f"scan {rates.scan / GB:.2f} GB/s · fingerprint {rates.fingerprint / GB:.2f} GB/s · "
            f"one-thread read {rates.read / GB:.2f} GB/s · scan/read {rates.scan / rates.read:.2f}"
        )
        memory.report(memory.measure(models, state=Path(folder) / "state"))


if __name__ == "__main__":
    main()
