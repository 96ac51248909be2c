"""Delta folders that lie, are damaged or are something else: refused before a byte of data counts.

RELIABILITY rows A1 to A6, A8, A10 and A13 to A15, for deltas.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linker_core.errors import BadCheckpointError, LinkerError, UnsupportedFormatError
from linker_core.sharing.delta import DeltaFile, open_weights
from linker_core.sharing.delta_data import check_data
from linker_core.sharing.delta_layout import DELTA_FILE
from tests.linker_core.sharing.delta_edits import (
    ALIAS,
    CODES,
    EMBED,
    FACTORS,
    HEAD,
    NORM,
    edit_header,
    edit_plan,
    read_delta,
    write_header,
    write_small,
)

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("deltas"))


@pytest.fixture
def path(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "delta"))


def refused(path: Path, why: str) -> None:
    with pytest.raises(BadCheckpointError, match=why) as caught:
        DeltaFile.open(path)
    assert len(caught.value.message) < 600
    assert "\n" not in caught.value.message


def test_open_honest_delta_gives_every_entry_its_bytes(path: Path) -> None:
    header, data = read_delta(path)
    with DeltaFile.open(path) as delta:
        assert set(delta.tensors) == set(header) - {"__metadata__"}
        assert delta.nbytes == len(data) == delta.plan.unique_bytes
        for name in delta.tensors:
            begin, end = header[name]["data_offsets"]
            words = bytearray(end - begin)
            delta.read_into(name, memoryview(words))
            assert words == data[begin:end]
            half = memoryview(words)[len(words) // 2 :]
            delta.read_into(name, half, offset_bytes=len(words) // 2)
            assert words == data[begin:end]


def test_identity_and_fingerprint_change_with_the_file(path: Path) -> None:
    with DeltaFile.open(path) as before:
        identity, fingerprint = before.identity, before.fingerprint
    edit_plan(path, lambda plan: plan.update(variant_fingerprint="c" * 64))
    with DeltaFile.open(path) as after:
        assert after.identity != identity
        assert after.fingerprint != fingerprint
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with DeltaFile.open(path) as other:
        assert other.fingerprint not in (fingerprint, after.plan.variant_fingerprint)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda meta: meta.update(format="pt"), "format"),
        (lambda meta: meta.pop("format"), "format"),
        (lambda meta: meta.update(version="2"), "version '2'.*version '1'"),
        (lambda meta: meta.update(version=1), "object of texts"),
        (lambda meta: meta.pop("version"), "version"),
        (lambda meta: meta.update(blake3="0" * 63), "hexadecimal"),
        (lambda meta: meta.update(blake3=["0" * 64]), "object of texts"),
        (lambda meta: meta.pop("blake3"), "exactly"),
        (lambda meta: meta.update(plan={}), "object of texts"),
        (lambda meta: meta.update(author="x"), "exactly"),
        (lambda meta: meta.update(plan="[]"), "no JSON object"),
        (lambda meta: meta.update(plan="{"), "not valid JSON"),
        (lambda meta: meta.update(plan="[" * 100_000), "not valid JSON"),
        (lambda meta: meta.update(plan="\ud800"), "JSON"),
    ],
)
def test_open_other_metadata_is_refused(path: Path, change: Edit, why: str) -> None:
    edit_header(path, lambda header: change(header["__metadata__"]))
    refused(path, why)


@pytest.mark.parametrize("metadata", [None, [], "plan", 1])
def test_open_without_metadata_is_refused(path: Path, metadata: Any) -> None:
    edit_header(path, lambda header: header.update(__metadata__=metadata))
    refused(path, "__metadata__")


_NUMBERS = (
    "logical_bytes", "unique_bytes", "num_weights", "checkpoint_bytes", "shared_bytes",
    "bits_per_weight", "blocks_shared",
)  # fmt: skip


@pytest.mark.parametrize("key", _NUMBERS)
@pytest.mark.parametrize("change", [lambda n: 9 * n + 1, lambda n: -n - 1, str, lambda n: [n]])
def test_open_plan_with_another_number_is_refused(
    path: Path, key: str, change: Callable[[Any], Any]
) -> None:
    edit_plan(path, lambda plan: plan.update({key: change(plan[key])}))
    refused(path, "plan")


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["rungs"].pop(NORM),
        lambda plan: plan["rungs"].update(ghost="alias"),
        lambda plan: plan["rungs"].update({NORM: "int4:64"}),
        lambda plan: plan["rungs"].update({NORM: "rows"}),
        lambda plan: plan["rungs"].update({CODES: "rows"}),
        lambda plan: plan["rungs"].update({CODES: "int5:64"}),
        lambda plan: plan["rungs"].update({CODES: "rank04:8+signs:64"}),
        lambda plan: plan["rungs"].update({CODES: "rank49:8+signs:64"}),
        lambda plan: plan["rungs"].update({CODES: "rank4096:16"}),
        lambda plan: plan["rungs"].update({CODES: None}),
        lambda plan: plan["rungs"].update({CODES: ["alias"]}),
        lambda plan: plan.update(rungs=[]),
        lambda plan: plan.update(rungs=None),
        lambda plan: plan["own_rows"].update({EMBED: 515}),
        lambda plan: plan["own_rows"].update({EMBED: -1}),
        lambda plan: plan["own_rows"].update({EMBED: True}),
        lambda plan: plan["own_rows"].update({HEAD: 1}),
        lambda plan: plan["own_rows"].clear(),
        lambda plan: plan.update(own_rows=[1]),
        lambda plan: plan["rung_bytes"].update(own=1),
        lambda plan: plan["rung_bytes"].update(int4=0),
        lambda plan: plan["rung_bytes"].pop("own"),
        lambda plan: plan.update(rung_bytes={"own": "1"}),
        lambda plan: plan["blocks"].update(own=1),
        lambda plan: plan["blocks"].update(total=3),
        lambda plan: plan["blocks"].update(alias=10**9),
        lambda plan: plan.update(blocks=None),
        lambda plan: plan.update(policy="donor"),
        lambda plan: plan.update(policy="best"),
        lambda plan: plan.update(policy=None),
        lambda plan: plan.update(donor_fingerprint=None),
        lambda plan: plan.update(donor_fingerprint="../" + "a" * 61),
        lambda plan: plan.update(variant_fingerprint="A" * 64),
        lambda plan: plan.update(variant_fingerprint="a" * 63),
        lambda plan: plan.update(mean_cos=2.0),
        lambda plan: plan.update(mean_epsilon=-1.0),
        lambda plan: plan.update(mean_epsilon="0"),
        lambda plan: plan.update(region="far"),
        lambda plan: plan.update(threshold_source="x" * 300),
        lambda plan: plan.update(threshold_source="a\nb"),
        lambda plan: plan.update(tau_cos=True),
        lambda plan: plan.update(budget_kl=-0.5),
        lambda plan: plan.update(price={}),
        lambda plan: plan.update(price=0.0),
        lambda plan: plan.pop("price"),
        lambda plan: plan.pop("num_weights"),
        lambda plan: plan.update(note="hello"),
    ],
)
def test_open_plan_that_lies_is_refused(path: Path, change: Edit) -> None:
    edit_plan(path, change)
    refused(path, DELTA_FILE)


PRICE = {
    "kl": 0.01, "kl_upper": 0.02, "top1": 0.9, "ppl_ratio": 1.01, "tokens": 100,
    "calibration": "shipped", "matmul_precision": "highest", "encoding": 1,
}  # fmt: skip


def test_open_price_is_read_as_it_stands(path: Path) -> None:
    edit_plan(path, lambda plan: plan.update(price=PRICE, budget_kl=0.05))
    with DeltaFile.open(path) as delta:
        assert delta.plan.price is not None
        assert delta.plan.price.to_json() == PRICE


@pytest.mark.parametrize(
    "change",
    [
        {"kl": -1e-9}, {"kl": None}, {"kl": "0"}, {"kl_upper": 1e300}, {"top1": 1.5},
        {"tokens": 1.5}, {"tokens": -1}, {"calibration": 5}, {"calibration": "a\nb"},
        {"matmul_precision": "low"}, {"encoding": "1"}, {"encoding": -1}, {"extra": 1},
    ],
)  # fmt: skip
def test_open_impossible_price_is_refused(path: Path, change: dict[str, Any]) -> None:
    edit_plan(path, lambda plan: plan.update(price=PRICE | change))
    refused(path, "price")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_open_number_that_is_none_is_refused(path: Path, number: str) -> None:
    def spoil(header: dict[str, Any]) -> None:
        plan = header["__metadata__"]["plan"]
        header["__metadata__"]["plan"] = plan.replace('"mean_epsilon":', f'"x":{number},"y":')

    edit_header(path, spoil)
    refused(path, "not valid JSON")


@pytest.mark.parametrize(
    "name",
    [
        NORM, f"{EMBED}.rows", f"{EMBED}.positions", f"{CODES}.dense.codes",
        f"{CODES}.dense.scales", f"{CODES}.down.codes", f"{CODES}.up.scales", f"{CODES}.extra",
        f"{FACTORS}.down.codes", f"{HEAD}.extra",
    ],
)  # fmt: skip
def test_open_missing_entry_is_named(path: Path, name: str) -> None:
    header, data = read_delta(path)
    begin, end = header.pop(name)["data_offsets"]
    del data[begin:end]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= begin:
            entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
    write_header(path, header, bytes(data))
    with pytest.raises(BadCheckpointError, match=name.removesuffix(".extra")):
        DeltaFile.open(path)


@pytest.mark.parametrize(
    "name", [ALIAS, f"{ALIAS}.dense.codes", f"{FACTORS}.down.scales", "ghost", "a.b.c"]
)
def test_open_entry_too_many_is_refused(path: Path, name: str) -> None:
    def add(header: dict[str, Any]) -> None:
        _, end = max(e["data_offsets"] for e in header.values() if "data_offsets" in e)
        header[name] = {"dtype": "BF16", "shape": [0, 4], "data_offsets": [end, end]}

    edit_header(path, add)
    refused(path, f"{name} is not part of the plan")


def test_open_entry_that_is_there_twice_is_refused(path: Path) -> None:
    header, data = read_delta(path)
    text = json.dumps(header)
    text = text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'
    encoded = text.encode()
    (path / DELTA_FILE).write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    refused(path, "twice")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{CODES}.dense.codes", {"dtype": "I64", "shape": [80, 2]}),
        (f"{CODES}.dense.codes", {"shape": [40, 32]}),
        (f"{CODES}.dense.codes", {"shape": [1280]}),
        (f"{CODES}.dense.codes", {"dtype": "BF16", "shape": [80, 8]}),
        (f"{CODES}.dense.scales", {"dtype": "F16"}),
        (f"{FACTORS}.up.codes", {"dtype": "BF16", "shape": [3, 24]}),
        (f"{EMBED}.positions", {"dtype": "F32", "shape": [4]}),
        (f"{EMBED}.rows", {"dtype": "U8", "shape": [2, 96]}),
        (NORM, {"dtype": "U8", "shape": [96]}),
        (NORM, {"shape": [48, 1]}),
        (f"{HEAD}.extra", {"shape": [96]}),
        (f"{HEAD}.extra", {"shape": [1, 96]}),
    ],
)
def test_open_entry_of_another_form_is_refused(
    path: Path, name: str, change: dict[str, Any]
) -> None:
    edit_header(path, lambda header: header[name].update(change))
    refused(path, DELTA_FILE)


def test_open_extra_rows_that_leave_nothing_to_code_are_refused(path: Path) -> None:
    edit_header(path, lambda header: header[f"{CODES}.extra"].update(shape=[78, 0]))
    refused(path, "leaves too few")


def test_open_swapped_parts_are_refused(path: Path) -> None:
    def swap(header: dict[str, Any]) -> None:
        down, up = f"{CODES}.down.codes", f"{CODES}.up.codes"
        header[down], header[up] = header[up], header[down]

    edit_header(path, swap)
    refused(path, "down.codes is U8")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 16 << 20, 0])
def test_open_header_of_impossible_length_is_refused(path: Path, length: int) -> None:
    content = (path / DELTA_FILE).read_bytes()
    (path / DELTA_FILE).write_bytes(length.to_bytes(8, "little") + content[8:])
    refused(path, DELTA_FILE)


def test_open_header_beyond_the_models_own_limit_is_refused_unread(path: Path) -> None:
    header, data = read_delta(path)
    header["__metadata__"]["plan"] += " " * (2 << 20)
    write_header(path, header, bytes(data))
    refused(path, "header claims")


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1, -2000])
def test_open_truncated_file_is_refused(path: Path, size: int) -> None:
    file = path / DELTA_FILE
    os.truncate(file, size % file.stat().st_size if size < 0 else size)
    refused(path, DELTA_FILE)


def test_open_appended_bytes_are_refused(path: Path) -> None:
    with (path / DELTA_FILE).open("ab") as file:
        file.write(b"#!")
    refused(path, "appended")


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
def test_open_irregular_file_is_refused_at_once(path: Path, kind: str) -> None:
    file = path / DELTA_FILE
    file.rename(path / "kept")
    if kind == "symlink":
        file.symlink_to("kept")
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(BadCheckpointError, match=r"symbolic|regular"):
        open_weights(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "modeling_x.py"])
def test_open_beside_foreign_files_is_unsupported(path: Path, name: str) -> None:
    (path / name).write_bytes(b"never opened")
    with pytest.raises(UnsupportedFormatError, match=name):
        DeltaFile.open(path)


def test_open_beside_a_checkpoint_is_refused(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")
    refused(path, "not clear")


def test_open_config_of_another_model_is_refused(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    for change in ({"num_hidden_layers": 3}, {"intermediate_size": 128}, {"vocab_size": 2**22}):
        (path / "config.json").write_text(json.dumps(config | change))
        refused(path, DELTA_FILE)
    (path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(UnsupportedFormatError):
        DeltaFile.open(path)


def test_closed_twice_is_closed(path: Path) -> None:
    delta = DeltaFile.open(path)
    delta.close()
    delta.close()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_change_of_bytes_is_refused_or_of_no_consequence(
    path: Path, data: st.DataObject
) -> None:
    """What passes both checks is the same plan and the same data, padded differently at most."""
    file = path / DELTA_FILE
    content = file.read_bytes()
    passed: list[dict[str, Any]] = []
    try:
        spoiled = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(spoiled) - 1))
            spoiled[place] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            del spoiled[data.draw(st.integers(0, len(spoiled))) :]
        file.write_bytes(spoiled)
        with contextlib.suppress(LinkerError), DeltaFile.open(path) as delta:
            check_data(delta)
            passed.append(delta.plan.to_json())
        file.write_bytes(content)
        with DeltaFile.open(path) as honest:
            claims = ("variant_fingerprint", "donor_fingerprint", "checkpoint_bytes", "mean_cos",
                      "mean_epsilon", "logical_bytes", "shared_bytes", "policy")  # fmt: skip
            before = honest.plan.to_json()
            for plan, claim in itertools.product(passed, claims):
                plan[claim] = before[claim]
            assert passed in ([], [before])
    finally:
        file.write_bytes(content)
