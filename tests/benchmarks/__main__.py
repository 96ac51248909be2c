"""Every benchmark in one run: `make bench`. Figures go into docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path

from server.cli.bench import scan
from tests.benchmarks import memory


def main() -> None:
    """Makes a 400 MB family, then measures on it."""
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        models = memory.make_family(Path(folder))
        rates = scan.measure(models[0], models[1])
        print(json.dumps(rates, indent=1))
        memory.report(memory.measure(models, state=Path(folder) / "state"))


if __name__ == "__main__":
    main()
