"""Rows A1-A15 and A19: checkpoints that lie, sent to a running server, which goes on serving."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.server.advisories.attacks import edit_json, header_of, refused, write_header
from tests.server.live import LiveServer
from tests.tiny import make_checkpoint, save_state

WEIGHTS = "model.safetensors"
NAME = "model.layers.0.mlp.up_proj.weight"
BAD, FOREIGN = "bad_checkpoint", "unsupported_format"


def onboarded(server: LiveServer, source: Path, code: str = BAD, *, wait: bool = False) -> str:
    """Offers a checkpoint for serving and for a dry run; both must refuse it."""
    message = refused(server.onboard("attack", source, wait=wait), 400, code)
    planned = server.client.post("/models/plan", json={"source": str(source)})
    refused(planned, 400, code)
    jobs = server.client.get("/models/jobs").json()["data"]
    assert not any(job["status"] in ("queued", "running") for job in jobs)
    assert server.client.get("/models/attack").status_code in ((200,) if wait else (404,))
    if wait:
        assert server.client.delete("/models/attack").status_code == 200
    return message


@pytest.mark.parametrize(
    "start",
    [
        pytest.param((2**63).to_bytes(8, "little"), id="2^63"),
        pytest.param((2**64 - 1).to_bytes(8, "little"), id="2^64-1"),
        pytest.param(((16 << 20) + 1).to_bytes(8, "little"), id="above-the-cap"),
        pytest.param((10**6).to_bytes(8, "little"), id="above-the-file"),
        pytest.param(b"1234567", id="shorter-than-a-length"),
        pytest.param(b"", id="empty"),
    ],
)
def test_safetensors_abuse_1_header_length(target: LiveServer, source: Path, start: bytes) -> None:
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(start + (data[8:] if len(start) == 8 else b""))
    onboarded(target, source)


@pytest.mark.parametrize(
    "offsets",
    [
        pytest.param((-2, -2), id="overlap"),
        pytest.param((2, 2), id="hole"),
        pytest.param((-(2**40), 0), id="negative"),
        pytest.param((10**6, 0), id="reversed"),
    ],
)
def test_safetensors_abuse_2_offsets(
    target: LiveServer, source: Path, offsets: tuple[int, int]
) -> None:
    header, body = header_of(source / WEIGHTS)
    begin, end = header[NAME]["data_offsets"]
    header[NAME]["data_offsets"] = [begin + offsets[0], end + offsets[1]]
    write_header(source / WEIGHTS, header, body)
    onboarded(target, source)


def test_safetensors_abuse_3_polyglot(target: LiveServer, source: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("payload.py", "raise SystemExit")
    with (source / WEIGHTS).open("ab") as weights:
        weights.write(archive.getvalue())
    onboarded(target, source)


@pytest.mark.parametrize(
    "size",
    [pytest.param(2**20, id="CVE-2026-7482"), pytest.param(2**50, id="llama.cpp-issue-6774")],
)
def test_declared_size_beyond_the_file(target: LiveServer, source: Path, size: int) -> None:
    header, body = header_of(source / WEIGHTS)
    last = max((entry["data_offsets"][1], name) for name, entry in header.items() if name[0] != "_")
    header[last[1]]["data_offsets"][1] += size
    columns = header[last[1]]["shape"][-1] if len(header[last[1]]["shape"]) > 1 else 1
    header[last[1]]["shape"][0] += size // 2 // columns
    write_header(source / WEIGHTS, header, body)
    onboarded(target, source)


def test_safetensors_spec_duplicate_tensor_name(target: LiveServer, source: Path) -> None:
    header, body = header_of(source / WEIGHTS)
    again = f', "{NAME}": {json.dumps(header[NAME])}}}'
    write_header(source / WEIGHTS, json.dumps(header)[:-1] + again, body)
    assert "twice" in onboarded(target, source)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("../../etc/passwd", id="path"),
        pytest.param("a\x00b", id="nul"),
        pytest.param("a\n2026-01-01 ERROR forged line", id="newline"),
        pytest.param("x" * 10_000, id="10kB"),
        pytest.param("\u202emodel.norm.weight", id="bidi"),
        pytest.param("\x1b[2J\x1b]0;owned\x07", id="terminal"),
    ],
)
def test_llama_cpp_log_injection_tensor_name(
    target: LiveServer, source: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    header, body = header_of(source / WEIGHTS)
    header[name] = header.pop(NAME)
    write_header(source / WEIGHTS, header, body)
    onboarded(target, source)
    assert name not in caplog.text
    assert not any(name in line for line in target.client.get("/metrics").text.splitlines())


@pytest.mark.parametrize(
    "shape", [[0, 2**62], [2**63, 2], [2**32, 2**32], [1] * 5000], ids=lambda s: f"{s!s:.24}"
)
def test_safetensors_validation_overflow(
    target: LiveServer, source: Path, shape: list[int]
) -> None:
    header, body = header_of(source / WEIGHTS)
    header[NAME]["shape"] = shape
    write_header(source / WEIGHTS, header, body)
    onboarded(target, source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_safetensors_readme_payload_is_not_finite(
    target: LiveServer, source: Path, value: float
) -> None:
    state = load_file(source / WEIGHTS)
    state[NAME][3, 5] = value
    save_state(source, state)
    response = target.onboard("attack", source, donor="base")
    assert NAME in refused(response, 400, BAD)
    assert target.client.delete("/models/attack").status_code == 200


def lost(state: dict[str, torch.Tensor]) -> None:
    del state[NAME]


def added(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.0.mlp.backdoor.weight"] = torch.zeros(3)


def turned(state: dict[str, torch.Tensor]) -> None:
    state[NAME] = state[NAME].T.contiguous()


def retyped(state: dict[str, torch.Tensor]) -> None:
    state[NAME] = state[NAME].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "code"), [(lost, BAD), (added, BAD), (turned, BAD), (retyped, FOREIGN)]
)
def test_triton_reload_fail_leaves_what_is_resident(
    target: LiveServer, source: Path, change: Any, code: str
) -> None:
    before = target.client.get("/models/base").json()["bytes"]
    state = load_file(source / WEIGHTS)
    change(state)
    save_state(source, state)
    onboarded(target, source, code)
    assert target.client.get("/models/base").json()["bytes"] == before


@pytest.mark.parametrize(
    "shard",
    [
        pytest.param("../base/model.safetensors", id="parent"),
        pytest.param("/etc/passwd", id="absolute"),
        pytest.param("model-00009-of-00003.safetensors", id="absent"),
        pytest.param("pipe.safetensors", id="fifo"),
        pytest.param("link.safetensors", id="symlink"),
        pytest.param("/dev/zero", id="device"),
    ],
)
def test_cve_2026_69112_index_leads_elsewhere(target: LiveServer, source: Path, shard: str) -> None:
    model = make_checkpoint(source / "sharded", tie=False, shards=3)
    os.mkfifo(model / "pipe.safetensors")
    (model / "link.safetensors").symlink_to(source.parent / "base" / WEIGHTS)
    file = model / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][NAME] = shard
    file.write_text(json.dumps(index))
    onboarded(target, model)


@pytest.mark.parametrize("file", ["config.json", WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "symlink"])
def test_huntr_transformers_poc_file_that_is_none(
    target: LiveServer, source: Path, file: str, kind: str
) -> None:
    (source / file).unlink()
    if kind == "fifo":
        os.mkfifo(source / file)
    else:
        (source / file).symlink_to("/etc/passwd")
    onboarded(target, source)


@pytest.mark.parametrize("change", ["total_size", "doubled", "stray"])
def test_accelerate_index_lies(target: LiveServer, source: Path, change: str) -> None:
    model = make_checkpoint(source / "sharded", tie=False, shards=3)
    first = (model / "model-00001-of-00003.safetensors").read_bytes()
    if change == "total_size":
        index = json.loads((model / "model.safetensors.index.json").read_text())
        index["metadata"]["total_size"] = 1
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        name = "model-00002-of-00003" if change == "doubled" else "model-00004-of-00003"
        (model / f"{name}.safetensors").write_bytes(first)
    onboarded(target, model)


class _Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._canary),))


@pytest.mark.parametrize("sole", [True, False], ids=["sole", "beside"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("pytorch_model.bin", id="CVE-2026-15976"),
        pytest.param("model.pt2", id="torch-export-fallback"),
        pytest.param("model.pkl", id="pickle"),
        pytest.param("weights.npz", id="numpy"),
        pytest.param("model.gguf", id="gguf"),
    ],
)
def test_pickle_is_never_opened(
    target: LiveServer, source: Path, name: str, sole: bool, tmp_path: Path
) -> None:
    if sole:
        (source / WEIGHTS).unlink()
    (source / name).write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    onboarded(target, source, FOREIGN)
    assert not (tmp_path / "ran").exists()


def test_payload_would_run_if_it_were_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"auto_map": {"AutoModelForCausalLM": "evil.M"}}, id="CVE-2026-22807"),
        pytest.param({"architectures": ["EvilForCausalLM"]}, id="CVE-2026-27893"),
        pytest.param({"trust_remote_code": True}, id="CVE-2026-5241"),
        pytest.param({"auto_map": {"AutoConfig": "acme/x--evil.C"}}, id="CVE-2026-46517"),
    ],
)
def test_custom_code_is_never_run(
    target: LiveServer, source: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    edit_json(source / "config.json", **config)
    onboarded(target, source, FOREIGN)
    (source / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    onboarded(target, source, FOREIGN)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9}, {"vocab_size": 2**31}, {"hidden_size": 0},
        {"num_hidden_layers": 1000}, {"head_dim": 7}, {"num_attention_heads": -1},
        {"intermediate_size": "80"}, {"max_position_embeddings": 10**400},
        {"rope_theta": float("inf")}, {"num_key_value_heads": 3}, {"eos_token_id": -5},
        {"rope_scaling": {"rope_type": "llama3", "factor": 0}},
    ],
    ids=lambda config: f"{next(iter(config.items()))!s:.40}",
)  # fmt: skip
@pytest.mark.parametrize("source_of", ["CVE-2024-8063"])
def test_config_integer_bomb(
    target: LiveServer, source: Path, config: dict[str, Any], source_of: str
) -> None:
    del source_of
    edit_json(source / "config.json", **config)
    response = target.onboard("attack", source, wait=False)
    assert response.json()["error"]["code"] in (BAD, FOREIGN)
    refused(response, 400)


@pytest.mark.parametrize("kind", [pytest.param("zip", id="CVE-2024-45436"), "tar"])
def test_archive_is_not_unpacked(
    target: LiveServer, source: Path, kind: str, tmp_path: Path
) -> None:
    (source / WEIGHTS).unlink()
    slip = f"../../../../../../../..{tmp_path}/slipped"
    if kind == "zip":
        with zipfile.ZipFile(source / WEIGHTS, "w") as archive:
            archive.writestr(slip, "owned")
    else:
        with tarfile.open(source / WEIGHTS, "w") as tar:
            tar.addfile(tarfile.TarInfo(slip), io.BytesIO())
    onboarded(target, source)
    refused(target.onboard("attack", source / WEIGHTS, wait=False), 400)
    assert not (tmp_path / "slipped").exists()


def test_triton_issue_8793_environment_named_by_the_model(
    target: LiveServer, source: Path, tmp_path: Path
) -> None:
    (source / WEIGHTS).unlink()
    with tarfile.open(tmp_path / "env.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../slipped"), io.BytesIO())
    edit_json(source / "config.json", EXECUTION_ENV_PATH=str(tmp_path / "env.tar.gz"))
    refused(target.onboard("attack", source, wait=False), 400, FOREIGN)
    assert {path.name for path in tmp_path.iterdir()} == {"env.tar.gz"}


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("cut", id="cpython-issue-148650"),
        pytest.param("zeroed", id="TensorRT-LLM-issue-17368"),
    ],
)
def test_file_that_changes_under_a_resident_model(real: LiveServer, source: Path, how: str) -> None:
    assert real.onboard("attack", source, donor=None).status_code == 201
    said = real.complete("attack", "Once", temperature=0, max_tokens=4).json()["choices"]
    with (source / WEIGHTS).open("r+b") as file:
        file.truncate(512)
        if how == "zeroed":
            file.truncate(1 << 20)
    assert real.complete("attack", "Once", temperature=0, max_tokens=4).json()["choices"] == said
    assert real.client.post("/models/unload", json={"model": "attack"}).status_code == 200
    assert WEIGHTS in refused(real.complete("attack", "Once"), 503, "not_ready")
    assert real.client.delete("/models/attack").status_code == 200
