"""Copies of a checkpoint with other values in some tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linker_core.errors import BadCheckpointError, ConflictError
from linker_core.residency.changed_copy import write_changed_copy
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, save_state

CHANGED = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight")


def _data(checkpoint: Checkpoint, name: str) -> bytes:
    words = bytearray(checkpoint.tensors[name].nbytes)
    checkpoint.read_into(name, memoryview(words))
    return bytes(words)


def _pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


@pytest.mark.parametrize("shards", [1, 3])
def test_changed_tensors_are_new_and_the_others_the_sources(tmp_path: Path, shards: int) -> None:
    path = make_checkpoint(tmp_path / "source", shards=shards)
    seen = []
    with Checkpoint.open(path) as source:
        new = {name: bytes(reversed(_data(source, name)[:-1])) + b"\0" for name in CHANGED}
        write_changed_copy(
            source,
            tmp_path / "copy",
            {name: lambda data=data: _pieces(data) for name, data in new.items()},  # type: ignore[misc]
            texts={"note.json": "{}"},
            progress=lambda done, total: seen.append((done, total)),
        )
        with Checkpoint.open(tmp_path / "copy") as copy:
            assert copy.tensors == source.tensors
            for name in source.tensors:
                assert _data(copy, name) == new.get(name, _data(source, name))
        names = {file.name for file in path.iterdir()} | {"note.json"}
        assert {file.name for file in (tmp_path / "copy").iterdir()} == names
        total = sum(size for _, _, _, size, _, _ in source.identity)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "source")

    def broken() -> Iterator[bytes]:
        yield b"\0\0"
        raise BadCheckpointError("no more")

    with Checkpoint.open(path) as source, pytest.raises(BadCheckpointError, match="no more"):
        write_changed_copy(source, tmp_path / "copy", {CHANGED[0]: broken})
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_source_that_changes_meanwhile_is_no_copy(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "source")
    with Checkpoint.open(path) as source:
        data = _data(source, CHANGED[0])

        def touching() -> Iterator[bytes]:
            with (path / "model.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"\1")
            yield data

        with pytest.raises(BadCheckpointError, match="changed while"):
            write_changed_copy(source, tmp_path / "copy", {CHANGED[0]: touching})
    assert not (tmp_path / "copy").exists()


def test_a_source_that_is_cut_short_meanwhile_is_no_copy(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "source")
    with Checkpoint.open(path) as source:
        data = _data(source, CHANGED[0])

        def cutting() -> Iterator[bytes]:
            weights = path / "model.safetensors"
            with weights.open("r+b") as file:
                file.truncate(weights.stat().st_size - 100)
            yield data

        with pytest.raises(BadCheckpointError, match="while it was copied"):
            write_changed_copy(source, tmp_path / "copy", {CHANGED[0]: cutting})


@pytest.mark.parametrize("shards", [1, 3])
def test_a_head_that_is_stored_though_tied_changes_with_its_embedding(
    tmp_path: Path, shards: int
) -> None:
    path = make_checkpoint(tmp_path / "source", tie=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_state(path, state | {head: state[embedding].clone()}, shards=shards)
    with Checkpoint.open(path) as source:
        new = bytes(reversed(_data(source, embedding)[:-1])) + b"\0"
        write_changed_copy(source, tmp_path / "copy", {embedding: lambda: _pieces(new)})
        with Checkpoint.open(tmp_path / "copy") as copy:
            assert copy.tied_head == source.tied_head
            assert _data(copy, embedding) == new
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "copy").glob("*.safetensors"):
        stored |= load_file(file)
    assert torch.equal(stored.pop(head), stored.pop(embedding))
    assert all(torch.equal(value, state[name]) for name, value in stored.items())


def test_a_config_that_changes_meanwhile_is_no_copy(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "source", tie=True)
    config = path / "config.json"
    with Checkpoint.open(path) as source:
        untied = config.read_text().replace(
            '"tie_word_embeddings": true', '"tie_word_embeddings": false'
        )
        config.write_text(untied)
        with pytest.raises(BadCheckpointError, match=r"lm_head\.weight"):
            write_changed_copy(source, tmp_path / "copy", {})
    assert not (tmp_path / "copy").exists()


def test_a_target_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "source")
    with Checkpoint.open(path) as source, pytest.raises(ConflictError):
        write_changed_copy(source, path, {})
