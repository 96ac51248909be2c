from __future__ import annotations

import subprocess
import sys


def test_server_process_loads_no_tensor_library() -> None:
    code = (
        "import server.cli.serve, sys;"
        "heavy = {'torch', 'transformers', 'numba', 'accelerate'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_server_process_runs_no_template_itself() -> None:
    code = "import server.cli.serve, sys; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
