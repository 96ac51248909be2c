"""What the code must not do: read as syntax, since a rule that is only kept by habit is broken."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "linker_core", "analysis", "configs")
# Code that comes out of data, archives of strangers, and names of temporary files that race.
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy",
    "imp", "zipimport", "zipfile", "tarfile", "telnetlib", "xml", "code", "codeop", "requests",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "__import__", "torch.load", "torch.jit.load", "torch.hub.load", "os.system",
    "os.popen", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load",
    "tempfile.mktemp", "shutil.unpack_archive", "numpy.load", "np.load", "subprocess.getoutput",
    "pandas.read_pickle",
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"trust_remote_code": True, "shell": True, "verify": False,
                       "allow_pickle": True, "weights_only": False}  # fmt: skip
# Who may ask what day it is, and for what. Nobody who waits, counts or limits.
CALENDAR = {
    "linker_core/machine_code.py": "how old a kept file is",
    "linker_core/text/chat_template.py": "`strftime_now` of templates",
    "server/cli/analyze/report.py": "when a report was made",
    "server/cli/keys.py": "when a key was made or revoked",
    "server/cli/top/view.py": "how long ago a model was used",
    "server/gateway/answers.py": "`created` of an answer",
    "server/gateway/tracing.py": "when a span began; how long it took is of another clock",
    "server/metrics/analysis.py": "how old a study is, which may be older than this process",
    "server/onboarding/job_rows.py": "when a job was made",
    "server/onboarding/outcomes.py": "when a job ended",
    "server/onboarding/replays.py": "idempotency keys, kept for a day over restarts",
    "server/onboarding/scores.py": "when a model was scored",
    "server/registry/store.py": "when a tuning was saved",
    "server/residency/catalog.py": "`last_used_at` of a model; idle time is of another clock",
    "server/studies/cards.py": "how old a study is",
    "server/studies/studies.py": "when a study began and ended; what is waited for is of another",
}
# The engine's messages, over a socket that the server made for a process that the server started.
OWN_PROCESSES = [("server/bridge/channel.py", "pickle")]
FLOORS = {
    "starlette": (1, 3, 0), "h11": (0, 16), "jinja2": (3, 1, 6), "orjson": (3, 11, 6),
    "tokenizers": (0, 22), "safetensors": (0, 5),
}  # fmt: skip


@cache
def modules() -> dict[str, ast.Module]:
    """Every source file's syntax, by its path inside the project."""
    files = (file for package in PACKAGES for file in sorted((PROJECT / package).rglob("*.py")))
    return {str(file.relative_to(PROJECT)): ast.parse(file.read_text()) for file in files}


def dotted(node: ast.expr) -> str:
    """Returns `a.b.c` of an expression of that form, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path, module in modules().items():
        for node in ast.walk(module):
            if isinstance(node, ast.Call):
                yield f"{path}:{node.lineno}", node


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_code_to_look_at() -> None:
    assert len(modules()) > 200
    assert sum(1 for _ in calls()) > 5000


def test_nothing_is_imported_that_makes_code_of_data() -> None:
    found = [
        (path, name)
        for path, module in modules().items()
        for name in imported(module)
        if name.partition(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS
    ]
    assert found == OWN_PROCESSES


def test_nothing_is_called_that_makes_code_of_data() -> None:
    assert [place for place, call in calls() if dotted(call.func) in FORBIDDEN_CALLS] == []


def test_no_argument_takes_a_guard_away() -> None:
    found = [
        (place, argument.arg)
        for place, call in calls()
        for argument in call.keywords
        if isinstance(argument.value, ast.Constant)
        and argument.arg in FORBIDDEN_ARGUMENTS
        and argument.value.value is FORBIDDEN_ARGUMENTS[argument.arg]
    ]
    assert found == []


def test_wall_clock_is_read_for_dates_alone() -> None:
    """Deadlines and limits on the wall clock jump with it: daylight saving, NTP, an operator."""
    of_the_wall = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}
    readers = set()
    for path, module in modules().items():
        names = {dotted(node) for node in ast.walk(module) if isinstance(node, ast.Attribute)}
        if names & of_the_wall or "time.time" in set(imported(module)):
            readers.add(path)
    assert readers == set(CALENDAR)


def test_no_sql_is_put_together_as_text() -> None:
    """What runs in the database is written out or built of columns; values are parameters."""
    found = []
    for place, call in calls():
        name = dotted(call.func).rpartition(".")[2] or getattr(call.func, "attr", "")
        if name not in ("text", "execute", "executemany", "executescript", "exec_driver_sql"):
            continue
        for argument in call.args[:1]:
            formatted = isinstance(argument, ast.JoinedStr | ast.BinOp) or (
                isinstance(argument, ast.Call) and getattr(argument.func, "attr", "") == "format"
            )
            if formatted:
                found.append(place)
    assert found == []


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", list(FLOORS))
def test_versions_with_known_holes_are_not_installed(name: str) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    floors = {
        normal(match[1]): numbers(match[2])
        for requirement in project["dependencies"]
        if (match := re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement))
    }
    pins = {
        normal(line.partition("==")[0]): numbers(line.partition("==")[2])
        for line in (PROJECT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert pins[name] >= FLOORS[name]
    assert numbers(version(name)) >= FLOORS[name]
    assert name == "h11" or floors[name] >= FLOORS[name]  # that one is uvicorn's


def test_every_pin_is_one_version() -> None:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith(("#", "--"))]
    assert wanted
    assert [line for line in wanted if not re.fullmatch(r"[\w.-]+==[\w.+!]+( ;.*)?", line)] == []


def test_package_brings_nothing_that_runs_by_being_there() -> None:
    """PYSEC-2026-2: a `.pth` file is code that every start of Python executes."""
    for package in PACKAGES:
        found = [path for path in (PROJECT / package).rglob("*") if path.is_file()]
        kinds = {path.suffix for path in found if "__pycache__" not in path.parts}
        assert not kinds & {".pth", ".so", ".pyc", ".pkl", ".bin", ".egg-link", ".exe"}
        assert not any(path.stem in ("sitecustomize", "usercustomize") for path in found)
