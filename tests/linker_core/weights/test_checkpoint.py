"""RELIABILITY rows A1-A6, A8-A10, A12-A14: dishonest checkpoints are refused before reading."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from linker_core.errors import (
    BadCheckpointError,
    InsufficientCapacityError,
    LinkerError,
    UnsupportedFormatError,
)
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint
from tests.tiny import make_checkpoint, save_state

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def read_file(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_file(file: Path, header: str, body: bytes, *, length: int | None = None) -> None:
    encoded = header.encode()
    prefix = struct.pack("<Q", len(encoded) if length is None else length)
    file.write_bytes(prefix + encoded + body)


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, body = read_file(path / "model.safetensors")
    change(header)
    write_file(path / "model.safetensors", json.dumps(header), body)


def edit_config(path: Path, **changes: Any) -> None:
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(record | changes))


@pytest.mark.parametrize("shards", [1, 3])
def test_open_honest_checkpoint_reads_every_byte(tmp_path: Path, shards: int) -> None:
    path = make_checkpoint(tmp_path / "m", shards=shards)
    state: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        state |= load_file(file)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.nbytes == sum(t.nbytes for t in state.values())
        for name, tensor in state.items():
            words = tensor.view(torch.uint8).flatten().numpy().tobytes()
            buffer = bytearray(len(words) - 3)
            checkpoint.read_into(name, memoryview(buffer), offset_bytes=3)
            assert buffer == words[3:]


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, (16 << 20) + 1, 10**6])
def test_open_header_longer_than_file_or_limit_is_refused(path: Path, length: int) -> None:
    header, body = read_file(path / "model.safetensors")
    write_file(path / "model.safetensors", json.dumps(header), body, length=length)
    with pytest.raises(BadCheckpointError, match="header claims"):
        Checkpoint.open(path)


def test_open_header_beyond_the_models_own_limit_is_refused_unread(path: Path) -> None:
    header, body = read_file(path / "model.safetensors")
    padded = json.dumps(header) + " " * (2 << 20)  # the format itself allows the padding
    write_file(path / "model.safetensors", padded, body)
    with pytest.raises(BadCheckpointError, match="header claims"):
        Checkpoint.open(path)


def test_open_many_invented_tensors_are_refused_at_the_first(path: Path) -> None:
    def invent(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key[0] != "_")
        for number in range(1000):
            name = f"x{number}.rotary_emb.inv_freq"
            header[name] = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [end, end]}

    edit_header(path, invent)
    with pytest.raises(BadCheckpointError, match="not part of"):
        Checkpoint.open(path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_open_file_shorter_than_a_length_is_refused(path: Path, content: bytes) -> None:
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpointError, match="too short"):
        Checkpoint.open(path)


def test_open_truncated_file_is_refused(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(BadCheckpointError, match="truncated"):
        Checkpoint.open(path)


def test_open_trailing_bytes_are_refused(path: Path) -> None:
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"#!")
    with pytest.raises(BadCheckpointError, match="appended"):
        Checkpoint.open(path)


def test_open_duplicate_tensor_name_is_refused(path: Path) -> None:
    header, body = read_file(path / "model.safetensors")
    text = json.dumps(header)
    entry = json.dumps(header[NAME])
    write_file(path / "model.safetensors", text[:-1] + f', "{NAME}": {entry}}}', body)
    with pytest.raises(BadCheckpointError, match="twice"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b", "a\x00b", "a\nb", "x" * 10_000, "\uff4dodel"]
)
def test_open_strange_tensor_name_is_refused_and_not_echoed_raw(path: Path, name: str) -> None:
    edit_header(path, lambda header: header.update({name: header.pop(NAME)}))
    with pytest.raises(BadCheckpointError, match="tensor name") as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [0, 2**62]},
        {"shape": [-80, -48]},
        {"shape": [80.0, 48]},
        {"shape": [True, 48]},
        {"shape": "80"},
        {"shape": [48, 80]},
        {"dtype": "F32"},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [-2, 7678]},
        {"data_offsets": [100, 0]},
        {"data_offsets": [0]},
        {"extra": 1},
    ],
)
def test_open_lying_tensor_entry_is_refused(path: Path, entry: dict[str, Any]) -> None:
    edit_header(path, lambda header: header[NAME].update(entry))
    with pytest.raises(BadCheckpointError):
        Checkpoint.open(path)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F64", None])
def test_open_other_number_type_is_unsupported(path: Path, dtype: str | None) -> None:
    edit_header(path, lambda header: header[NAME].update(dtype=dtype))
    with pytest.raises(UnsupportedFormatError, match="BF16"):
        Checkpoint.open(path)


def test_open_overlapping_tensors_are_refused(path: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        begin, end = header[NAME]["data_offsets"]
        header[NAME]["data_offsets"] = [begin - 2, end - 2]

    edit_header(path, overlap)
    with pytest.raises(BadCheckpointError, match="overlap"):
        Checkpoint.open(path)


def test_open_missing_tensor_is_named(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    del state[NAME]
    save_state(path, state)
    with pytest.raises(BadCheckpointError, match=NAME):
        Checkpoint.open(path)


def test_open_extra_tensor_is_refused(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    save_state(path, state | {"model.layers.0.mlp.extra.weight": torch.zeros(3)})
    with pytest.raises(BadCheckpointError, match="extra"):
        Checkpoint.open(path)


def test_open_config_larger_than_shards_is_refused(path: Path) -> None:
    edit_config(path, num_hidden_layers=1000)
    with pytest.raises(BadCheckpointError, match="missing"):
        Checkpoint.open(path)


def test_open_harmless_extras_are_noted_and_ignored(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    save_state(path, state)
    with Checkpoint.open(path) as checkpoint:
        assert len(checkpoint.notes) == 2
        assert "lm_head.weight" not in checkpoint.tensors
        assert checkpoint.tied_head is not None
        assert checkpoint.tied_head.name == "lm_head.weight"


def test_open_tied_head_with_other_values_is_refused(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_state(path, state)
    with pytest.raises(BadCheckpointError, match=r"lm_head\.weight"):
        Checkpoint.open(path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
def test_open_irregular_file_is_refused_at_once(path: Path, file: str, kind: str) -> None:
    (path / file).rename(path / "kept")
    if kind == "symlink":
        (path / file).symlink_to("kept")
    elif kind == "fifo":
        os.mkfifo(path / file)
    else:
        (path / file).mkdir()
    reason = "symbolic link" if kind == "symlink" else "regular file"
    with pytest.raises(BadCheckpointError, match=reason):
        Checkpoint.open(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "x.pkl", "modeling_x.py"])
@pytest.mark.parametrize("sole", [True, False])
def test_open_directory_with_foreign_weights_is_unsupported(
    path: Path, name: str, sole: bool
) -> None:
    if sole:
        (path / "model.safetensors").unlink()
    (path / name).write_bytes(b"never opened")
    with pytest.raises(UnsupportedFormatError, match=name):
        Checkpoint.open(path)


def test_open_directory_with_trainer_leftovers_is_accepted(path: Path) -> None:
    (path / "training_args.bin").write_bytes(b"never opened")
    Checkpoint.open(path).close()


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["weight_map"].update({NAME: "model-00009-of-00003.safetensors"}),
        lambda index: index["weight_map"].update({NAME: "../model-00001-of-00003.safetensors"}),
        lambda index: index["weight_map"].update({NAME: "/etc/passwd"}),
        lambda index: index["weight_map"].pop(NAME),
        lambda index: index["weight_map"].update({"ghost": "model-00001-of-00003.safetensors"}),
        lambda index: index["metadata"].update(total_size=1),
        lambda index: index.update(weight_map=[1]),
        lambda index: index["weight_map"].update({NAME: 5}),
    ],
)
def test_open_dishonest_index_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = make_checkpoint(tmp_path / "m", shards=3)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(BadCheckpointError, match="index"):
        Checkpoint.open(path)


def test_open_stray_or_doubled_shard_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", shards=3)
    first = path / "model-00001-of-00003.safetensors"
    (path / "model-00004-of-00003.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(BadCheckpointError, match="model-00004"):
        Checkpoint.open(path)
    (path / "model-00004-of-00003.safetensors").unlink()
    (path / "model-00002-of-00003.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(BadCheckpointError, match="another shard"):
        Checkpoint.open(path)


def test_open_missing_directory_does_not_echo_the_path(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpointError, match="No such file") as caught:
        Checkpoint.open(tmp_path / "secret-place")
    assert "secret-place" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"a":NaN}', "[" * 5000, '{"a":1,"a":1}'])
def test_open_config_that_is_no_strict_json_is_refused(path: Path, text: str) -> None:
    (path / "config.json").write_text(text)
    with pytest.raises(BadCheckpointError, match=r"config\.json"):
        Checkpoint.open(path)


def test_read_of_a_file_that_shrank_is_an_error_not_a_signal(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        os.truncate(path / "model.safetensors", 4096)
        with pytest.raises(BadCheckpointError, match="shorter"):
            checkpoint.read_into(NAME, memoryview(bytearray(checkpoint.tensors[NAME].nbytes)))


def test_identity_changes_with_the_file(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        before = checkpoint.identity
        os.utime(path / "model.safetensors", ns=(1, 1))
        assert checkpoint.identity != before


def test_identity_changes_with_the_bytes_though_the_times_are_put_back(path: Path) -> None:
    file = path / "model.safetensors"
    with Checkpoint.open(path) as checkpoint:
        before, stat = checkpoint.identity, file.stat()
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)[0]
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last ^ 1]))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert file.stat().st_mtime_ns == stat.st_mtime_ns
        assert checkpoint.identity != before


def test_fingerprint_follows_the_bytes_and_not_the_place(path: Path, tmp_path: Path) -> None:
    twin = make_checkpoint(tmp_path / "twin")
    other = make_checkpoint(tmp_path / "other", seed=1)
    digests = []
    for place in (path, twin, other):
        with Checkpoint.open(place) as checkpoint:
            digests.append(fingerprint(checkpoint))
    assert digests[0] == digests[1] != digests[2]


def test_fingerprint_follows_the_config(path: Path) -> None:
    digests = set()
    for change in ({}, {"rms_norm_eps": 1e-5}, {"eos_token_id": 7}, {"rope_theta": 5e5}):
        edit_config(path, **change, rope_parameters=None)
        with Checkpoint.open(path) as checkpoint:
            digests.add(fingerprint(checkpoint))
    assert len(digests) == 4


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_open_mutated_header_is_equal_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    base = tmp_path_factory.getbasetemp() / "mutants"
    if not base.exists():
        make_checkpoint(base)
        (base / "model.safetensors").rename(base / "good")
    good = (base / "good").read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    mutant = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        mutant[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    (base / "model.safetensors").write_bytes(mutant)
    try:
        checkpoint = Checkpoint.open(base)
    except LinkerError:
        return  # refused with a reason, never a traceback of another kind
    with checkpoint:
        header, _ = read_file(base / "model.safetensors")
        header.pop("__metadata__", None)
        assert {n: tuple(e["shape"]) for n, e in header.items()} == {
            n: t.shape for n, t in checkpoint.tensors.items()
        }


@pytest.mark.parametrize("value", [1, None, ["pt"], {"format": "pt"}, True])
def test_open_metadata_that_is_no_text_is_refused(path: Path, value: object) -> None:
    """safetensors' own reader refuses it, too: two readers of one file must not disagree."""
    edit_header(path, lambda header: header.update({"__metadata__": {"format": value}}))
    with pytest.raises(BadCheckpointError, match="texts"):
        Checkpoint.open(path)


@pytest.mark.parametrize("key", ["a\r\nb", "\x1b[2J", "\u2028"])
def test_open_strange_key_of_rope_is_refused_and_not_echoed_raw(path: Path, key: str) -> None:
    edit_config(path, rope_parameters={"rope_type": "default", key: 1})
    with pytest.raises(UnsupportedFormatError, match="has no") as caught:
        Checkpoint.open(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("number", [0, 1])
def test_open_without_a_free_descriptor_blames_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    opened: list[object] = []
    real = os.open

    def few(*args: Any, **kwargs: Any) -> int:
        if len(opened) == number:
            raise OSError(errno.EMFILE, "Too many open files")
        opened.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "open", few)
    with pytest.raises(InsufficientCapacityError, match=r"ulimit -n"):
        Checkpoint.open(path)
