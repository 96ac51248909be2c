"""Memory of N resident variants: `make bench`. `linker bench` measures the rest."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

from server.cli.bench import BENCHMARKS
from tests.benchmarks import memory


def main() -> None:
    """Makes a 400 MB family, then measures on it."""
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        models = memory.make_family(Path(folder))
        memory.report(memory.measure(models, state=Path(folder) / "state"))
    for name, text in BENCHMARKS.items():
        print(f"linker bench {name}: {text}")


if __name__ == "__main__":
    main()
