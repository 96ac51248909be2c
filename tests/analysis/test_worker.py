from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis import worker
from analysis.selection import select
from linker_core.weights.checkpoint import Checkpoint
from tests.analysis.planted import Planted, Structure, plant_family

DEADLINE_S = 120.0


def request_of(family: Planted, **changes: Any) -> dict[str, Any]:
    return {
        "base": {"name": "acme/base", "path": str(family.base)},
        "variants": {name: str(path) for name, path in family.variants.items()},
        "num_done": 0,
        "seed": 0,
        **changes,
    }


def run(
    request: Mapping[str, Any], *, done: Sequence[object] = (), told: str = ""
) -> tuple[int, list[dict[str, Any]]]:
    """Returns a worker's exit status and what it said."""
    lines = [{**request, "num_done": len(done)}, *done]
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "analysis.worker"],
        input="".join(json.dumps(line) + "\n" for line in lines) + told,
        stdout=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()]


def records(said: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [line["record"] for line in said if "record" in line]


def summary_of(said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the summary without what is of the worker rather than the weights."""
    return {key: value for key, value in said[-1]["result"].items() if key != "background"}


@pytest.fixture(scope="module")
def whole(small_family: Planted) -> list[dict[str, Any]]:
    status, said = run(request_of(small_family))
    assert status == 0
    return said


def test_files_then_records_in_order_then_the_summary(
    small_family: Planted, whole: list[dict[str, Any]]
) -> None:
    with Checkpoint.open(small_family.base) as base:
        names = select(base)
        identity = [list(file) for file in base.identity]
    assert whole[0]["opened"]["num_tensors"] == len(names)
    assert whole[0]["opened"]["base"] == identity
    assert list(whole[0]["opened"]["variants"]) == list(small_family.names)
    assert [record["name"] for record in records(whole)] == list(names)
    summary = whole[-1]["result"]
    assert len(whole) == len(names) + 2
    assert (summary["base"], summary["num_tensors"]) == ("acme/base", len(names))
    assert list(summary["variants"]) == list(small_family.names)


def test_records_hold_what_was_planted(small_family: Planted, whole: list[dict[str, Any]]) -> None:
    for record in records(whole):
        planted_NN = small_family.grams_NN[record["name"]]
        for number, norm in enumerate(record["norms"]):
            assert norm == pytest.approx(planted_NN[number, number] ** 0.5, rel=1e-3)


@pytest.mark.parametrize("num_done", [1, 5, 13, 14])
def test_what_is_done_is_not_done_again_and_changes_nothing(
    small_family: Planted, whole: list[dict[str, Any]], num_done: int
) -> None:
    done = records(whole)[:num_done]
    status, said = run(request_of(small_family), done=done[::-1])
    assert status == 0
    assert records(said) == records(whole)[num_done:]  # to the bit
    assert summary_of(said) == summary_of(whole)


def test_damaged_records_and_those_of_others_are_made_again(
    small_family: Planted, whole: list[dict[str, Any]]
) -> None:
    first, second, third = records(whole)[:3]
    damaged = [
        {"name": first["name"]},
        {**second, "norms": second["norms"][:2]},
        {**third, "name": "model.layers.99.mlp.up_proj.weight"},
        {},
        3,
    ]
    _, said = run(request_of(small_family), done=damaged)
    assert records(said) == records(whole)


def test_time_is_accounted_by_what_it_was_told(small_family: Planted) -> None:
    status, said = run(request_of(small_family), told="busy\n")
    assert status == 0
    for line in said[1:-1]:
        busy_s, busy_cpu_s, idle_s, idle_cpu_s = line["spent"]
        assert busy_s + idle_s > 0.0
        assert busy_cpu_s + idle_cpu_s > 0.0
    background = said[-1]["result"]["background"]
    assert set(background) == {"busy_s", "busy_cpu_s", "idle_s", "idle_cpu_s"}


@pytest.mark.parametrize("num_variants", [2, 3])
def test_small_families_are_studied_too(tmp_path: Path, num_variants: int) -> None:
    family = plant_family(tmp_path, Structure(num_variants=num_variants))
    status, said = run(request_of(family))
    assert status == 0
    components = said[-1]["result"]["components"]
    assert (components["all"]["pc1_centred"] is None) == (num_variants == 2)


def test_copy_of_the_base_is_no_reason_to_fail(tmp_path: Path) -> None:
    family = plant_family(tmp_path, Structure(num_variants=4, scales={"two": 0.0}))
    status, said = run(request_of(family))
    assert status == 0
    found = said[-1]["result"]["variants"]["two"]
    assert found["delta_norm"] == 0.0
    assert "degenerate" in [one["kind"] for one in found["diagnostics"]]


def test_error_names_the_model_and_no_directory(tmp_path: Path) -> None:
    family = plant_family(tmp_path, Structure(num_variants=3))
    weights = family.variants["two"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    status, said = run(request_of(family))
    assert status == 1
    assert said[-1]["error"]["code"] == "bad_checkpoint"
    assert said[-1]["error"]["message"].startswith("two: ")
    assert said[-1]["error"]["param"] == "variants.two"
    assert str(tmp_path) not in said[-1]["error"]["message"]


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    family = plant_family(tmp_path, Structure(num_variants=3))
    weights = family.variants["three"] / "model.safetensors"
    with Checkpoint.open(family.variants["three"]) as checkpoint:
        place = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"].offset
    content = bytearray(weights.read_bytes())
    content[place : place + 4] = b"\x00\x00\xc0\x7f"  # NaN
    weights.write_bytes(content)
    status, said = run(request_of(family))
    assert status == 1
    message = said[-1]["error"]["message"]
    assert message.startswith("three: ")
    assert said[-1]["error"]["param"] == "variants.three"
    assert "model.layers.1.mlp.up_proj.weight has NaN" in message
    assert 0 < len(records(said)) < len(family.grams_NN)  # what came before it is known


def test_weights_that_change_meanwhile_give_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = plant_family(tmp_path, Structure(num_variants=3))
    weights = family.variants["two"] / "model.safetensors"
    said: list[Mapping[str, Any]] = []

    def say(line: Mapping[str, Any]) -> None:
        said.append(line)
        if len(records(said)) == 2:
            os.utime(weights, ns=(1, 1))

    monkeypatch.setattr(worker, "say", say)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request_of(family)) + "\n"))
    assert worker.main() == 1
    assert len(records(said)) == 2
    assert said[-1]["error"]["code"] == "bad_checkpoint"
    assert said[-1]["error"]["message"].startswith("two: a weight file changed")
    assert said[-1]["error"]["param"] == "variants.two"


def test_another_family_is_refused(small_family: Planted, tmp_path: Path) -> None:
    other = plant_family(tmp_path, Structure(num_variants=1), layers=1)
    variants = {"one": str(small_family.variants["one"]), "other": str(other.base)}
    status, said = run(request_of(small_family, variants=variants))
    assert status == 1
    assert said[-1]["error"]["message"].startswith("other: ")
    assert said[-1]["error"]["param"] == "variants.other"


def test_error_of_the_base_is_the_bases(tmp_path: Path) -> None:
    family = plant_family(tmp_path, Structure(num_variants=2))
    (family.base / "config.json").unlink()
    _, said = run(request_of(family))
    assert said[-1]["error"]["param"] == "base"


def test_nobody_listening_is_no_fault(small_family: Planted, tmp_path: Path) -> None:
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "analysis.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        process.stdin.write(json.dumps(request_of(small_family)) + "\n")
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 1
        errors.seek(0)
        assert errors.read() == ""


def test_worker_is_light() -> None:
    """It shares a machine with an engine; what it runs was compiled before."""
    heavy = ("torch", "transformers", "scipy", "plotly", "numba", "sqlalchemy")
    script = f"import sys, analysis.worker; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert said.stdout == "[]\n"


def test_twice_the_weights_take_no_more_private_memory(tmp_path: Path) -> None:
    """What is mapped is the system's to take back, and does not count."""
    sizes, used = [], []
    for layers in (2, 4):
        folder = tmp_path / str(layers)
        folder.mkdir()
        structure = Structure(num_variants=3, orthogonal=False)
        family = plant_family(folder, structure, layers=layers, hidden=256, intermediate=1024)
        files = [path / "model.safetensors" for path in (family.base, *family.variants.values())]
        sizes.append(sum(file.stat().st_size for file in files))
        used.append(private_memory(family, folder / "request.json"))

    grown = sizes[1] - sizes[0]
    assert grown > 24 << 20
    for less, more in zip(*used, strict=True):
        assert more - less < grown / 8


def private_memory(family: Planted, request: Path) -> tuple[int, int]:
    """Returns the most bytes that a worker had allocated, and that were its own at any record."""
    request.write_text(json.dumps(request_of(family)) + "\n")
    script = (
        "import sys, pathlib, tracemalloc, analysis.worker as w\n"
        "def say(line):\n"
        "    status = pathlib.Path('/proc/self/status').read_text()\n"
        "    owned.extend(int(l.split()[1]) for l in status.splitlines() if 'RssAnon' in l)\n"
        "owned, w.say = [], say\n"
        f"sys.stdin = open({str(request)!r})\n"
        "tracemalloc.start()\n"
        "assert w.main() == 0\n"
        "print(tracemalloc.get_traced_memory()[1], 1024 * max(owned))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    allocated, owned = map(int, said.stdout.split())
    return allocated, owned


@pytest.mark.shared
def test_trained_family_is_studied(shared: Path) -> None:
    root = shared / "families" / "mini-qwen2"
    names = ("chat", "code", "instruct", "math")
    variants = {name: root / name for name in names}
    family = Planted(base=root / "base", variants=variants, grams_NN={})
    status, said = run(request_of(family))
    assert status == 0
    assert said[-1]["result"]["components"]["all"]["num_tensors"] == 56
