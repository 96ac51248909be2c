"""A variant written as a delta and read back: what the encoder gives, and nothing by halves."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from linker_core.errors import (
    BadCheckpointError,
    ConflictError,
    InsufficientCapacityError,
    InvalidRequestError,
    LinkerError,
)
from linker_core.pace import Pace
from linker_core.residency import delta_writer
from linker_core.residency.coding import pack_codes
from linker_core.residency.delta_entries import EntryWriter
from linker_core.residency.delta_writer import write_delta
from linker_core.residency.new_folder import INCOMPLETE
from linker_core.residency.stored import StoredTensor
from linker_core.sharing.delta import DeltaFile, open_weights
from linker_core.sharing.delta_data import check_data, check_donor
from linker_core.sharing.delta_layout import DELTA_FILE, entries_of
from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import AnyRung, Residual, Rung, kind_of, parse_rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME
from tests.linker_core.residency.deltas import encoded, random_rungs, write_planned
from tests.tiny import make_checkpoint, make_variant

HEAD = "lm_head.weight"


def write_random(folder: Path, *, dtype: str = "bfloat16") -> tuple[SharePlan, Path]:
    """Writes donor, variant and a delta of many rungs into a folder."""
    donor_path = make_checkpoint(folder / "donor", tie=False, dtype=dtype, layers=4)
    names = load_file(donor_path / "model.safetensors")
    variant_path = make_variant(
        folder / "variant",
        donor_path,
        scale={name: 0.05 for name in names if name != EMBED_NAME},
        added_tokens=["<new>", "<newer>"],
        rows={EMBED_NAME: [3, 500]},
    )
    with Checkpoint.open(donor_path) as donor, Checkpoint.open(variant_path) as variant:
        rungs = random_rungs(random.Random(5), donor, variant)
    rungs[EMBED_NAME] = Rung.ROWS
    return write_planned(donor_path, variant_path, folder / "delta", rungs), folder / "delta"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[SharePlan, Path]:
    return write_random(tmp_path_factory.mktemp("written"))


def write_again(written: tuple[SharePlan, Path], target: Path, **options: Any) -> None:
    plan, path = written
    with (
        Checkpoint.open(path.parent / "donor") as donor,
        Checkpoint.open(path.parent / "variant") as variant,
    ):
        write_delta(options.pop("plan", plan), donor, variant, target, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_delta_read_back_holds_what_the_encoder_gives(tmp_path: Path, dtype: str) -> None:
    plan, path = write_random(tmp_path, dtype=dtype)
    base = load_file(tmp_path / "donor" / "model.safetensors")
    whole = load_file(tmp_path / "variant" / "model.safetensors")
    with DeltaFile.open(path) as delta:
        assert delta.plan == plan
        assert delta.nbytes == plan.unique_bytes
        assert delta.eos_token_ids == {2}
        stored = load_file(path / "delta.safetensors")  # any reader of safetensors will do
        assert set(stored) == set(delta.tensors)
        kinds = {kind_of(rung) for rung in plan.rungs.values()}
        assert kinds > {"alias", "own", "rows", "lowrank"}
        for name, rung in plan.rungs.items():
            if rung is Rung.OWN:
                assert torch.equal(stored.pop(name), whole[name])
            elif rung is Rung.ROWS:
                rebuilt = torch.cat([base[name], base[name][:2]])
                rebuilt[stored.pop(f"{name}.positions")] = stored.pop(f"{name}.rows")
                assert torch.equal(rebuilt, whole[name])
            elif isinstance(rung, Residual):
                again = encoded(StoredTensor(tensor=base[name]), whole[name], name, rung)
                assert torch.equal(stored.pop(f"{name}.extra"), again.extra)
                for part, matrix in (
                    ("dense", again.dense),
                    ("down", again.down),
                    ("up", again.up),
                ):
                    if matrix is not None:
                        assert torch.equal(stored.pop(f"{name}.{part}.codes"), matrix.codes_RB)
                        if matrix.bits < 16:
                            scales = stored.pop(f"{name}.{part}.scales")
                            assert torch.equal(scales, matrix.scales_RG)
        assert not stored


def test_same_inputs_give_the_same_bytes(written: tuple[SharePlan, Path], tmp_path: Path) -> None:
    write_again(written, tmp_path / "again")
    names = sorted(path.name for path in written[1].iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (written[1] / name).read_bytes()


def test_texts_are_copied_by_name_and_nothing_else(tmp_path: Path) -> None:
    donor_path = make_checkpoint(tmp_path / "donor")
    variant_path = make_variant(tmp_path / "variant", donor_path, scale=0.0)
    (variant_path / "training_args.bin").write_bytes(b"never opened")
    (variant_path / "notes.txt").write_text("private")
    (variant_path / "special_tokens_map.json").write_text("{}")
    write_planned(donor_path, variant_path, tmp_path / "delta", {})
    assert {path.name for path in (tmp_path / "delta").iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "chat_template.jinja", DELTA_FILE,
    }  # fmt: skip


def test_linked_tokenizer_is_refused_and_nothing_stays(
    written: tuple[SharePlan, Path], tmp_path: Path
) -> None:
    variant_path = Path(shutil.copytree(written[1].parent / "variant", tmp_path / "variant"))
    (variant_path / "tokenizer.json").unlink()
    (variant_path / "tokenizer.json").symlink_to("/etc/hostname")
    with (
        Checkpoint.open(written[1].parent / "donor") as donor,
        Checkpoint.open(variant_path) as variant,
        pytest.raises(BadCheckpointError, match="symbolic link"),
    ):
        write_delta(written[0], donor, variant, tmp_path / "delta")
    assert os.listdir(tmp_path) == ["variant"]  # noqa: PTH208


def test_progress_ends_with_everything_done(
    written: tuple[SharePlan, Path], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    write_again(written, tmp_path / "out", progress=lambda *now: seen.append(now))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_writing_rests_while_sequences_run(written: tuple[SharePlan, Path], tmp_path: Path) -> None:
    rests: list[float] = []
    pace = Pace(clock=lambda: sum(rests), sleep=rests.append)
    pace.busy = True
    write_again(written, tmp_path / "out", pace=pace)
    pace.busy = False
    assert sum(rests) > 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_full_disk_is_insufficient_capacity_and_nothing_stays(
    written: tuple[SharePlan, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
) -> None:
    def full(*_given: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(InsufficientCapacityError, match=r"out: .*Nothing was kept") as caught:
        write_again(written, tmp_path / "out")
    assert caught.value.param == "target"
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208


def test_small_disk_is_noticed_before_anything_is_encoded(
    written: tuple[SharePlan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(delta_writer, "DeltaEncoder", None)  # whose call would fail
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, limit[1]))
    try:
        with pytest.raises(InsufficientCapacityError):
            write_again(written, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_nothing(
    written: tuple[SharePlan, Path], tmp_path: Path
) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_again(written, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_written_to_meanwhile_is_noticed(
    written: tuple[SharePlan, Path], tmp_path: Path
) -> None:
    paths = [
        Path(shutil.copytree(written[1].parent / n, tmp_path / n)) for n in ("donor", "variant")
    ]

    def touch(_done: int, _total: int) -> None:
        os.utime(paths[0] / "model.safetensors")

    with (
        Checkpoint.open(paths[0]) as donor,
        Checkpoint.open(paths[1]) as variant,
        pytest.raises(BadCheckpointError, match="changed while"),
    ):
        write_delta(written[0], donor, variant, tmp_path / "out", progress=touch)
    assert {path.name for path in tmp_path.iterdir()} == {"donor", "variant"}


def test_variant_of_equal_bytes_is_a_delta_of_nothing(tmp_path: Path) -> None:
    donor_path = make_checkpoint(tmp_path / "donor")
    variant_path = make_variant(tmp_path / "variant", donor_path, scale=0.0)
    with Checkpoint.open(donor_path) as donor:
        rungs = dict.fromkeys(donor.tensors, Rung.ALIAS)
        write_planned(donor_path, variant_path, tmp_path / "delta", rungs)
        with DeltaFile.open(tmp_path / "delta") as delta:
            assert (delta.nbytes, dict(delta.tensors)) == (0, {})
            assert delta.plan.logical_bytes == donor.nbytes
            check_donor(delta, donor)
            check_data(delta)


def test_target_is_not_there_until_it_is_complete(
    written: tuple[SharePlan, Path], tmp_path: Path
) -> None:
    seen: set[str] = set()

    def look(_done: int, _total: int) -> None:
        seen.update(path.name for path in tmp_path.iterdir())

    write_again(written, tmp_path / "out", progress=look)
    assert len(seen) == 1
    assert seen.pop().startswith(f"{INCOMPLETE}out-")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_same_delta_that_is_there_is_left_alone(written: tuple[SharePlan, Path]) -> None:
    before = written[1].stat()
    write_again(written, written[1])
    assert (written[1].stat().st_ino, written[1].stat().st_mtime_ns) == (
        before.st_ino, before.st_mtime_ns
    )  # fmt: skip


@pytest.mark.parametrize("there", ["file", "folder", "empty", "link", "another"])
def test_other_target_is_a_conflict_and_left_alone(
    written: tuple[SharePlan, Path], tmp_path: Path, there: str
) -> None:
    target = tmp_path / "out"
    if there == "file":
        target.write_text("kept")
    elif there == "link":
        target.symlink_to("nowhere")
    elif there == "another":
        shutil.copytree(written[1], target)
    else:
        target.mkdir()
        if there == "folder":
            (target / "kept").write_text("kept")
    plan = replace(written[0], variant_fingerprint="c" * 64)
    with pytest.raises(ConflictError):
        write_again(written, target, plan=plan)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert there != "file" or target.read_text() == "kept"


@pytest.mark.parametrize("place", ["absent/out", "file/out"])
def test_target_out_of_reach_is_the_users_fault(
    written: tuple[SharePlan, Path], tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LinkerError, match=r"out cannot be (made|written)"):
        write_again(written, tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda rungs: rungs.pop("model.norm.weight"), BadCheckpointError),
        (lambda rungs: rungs.update({"model.norm.weight": parse_rung("int4:64")}), LinkerError),
        (lambda rungs: rungs.update({HEAD: parse_rung("rank49:8")}), InvalidRequestError),
        (
            lambda rungs: rungs.update({"model.layers.0.mlp.up_proj.weight": Rung.ROWS}),
            InvalidRequestError,
        ),
    ],
)
def test_plan_that_no_delta_can_hold_is_refused(
    written: tuple[SharePlan, Path],
    tmp_path: Path,
    change: Callable[[dict[str, AnyRung]], object],
    kind: type[LinkerError],
) -> None:
    rungs = dict(written[0].rungs)
    change(rungs)
    with pytest.raises(kind):
        write_again(written, tmp_path / "out", plan=replace(written[0], rungs=rungs))
    assert list(tmp_path.iterdir()) == []


def test_rank_above_the_rows_that_both_have_is_refused(tmp_path: Path) -> None:
    """Of added rows there is no delta; without them the donor has too few."""
    donor_path = make_checkpoint(tmp_path / "donor", vocab_size=260, hidden=272, tie=False)
    added = [f"<{number}>" for number in range(40)]
    variant_path = make_variant(tmp_path / "variant", donor_path, scale=0.05, added_tokens=added)
    with pytest.raises(InvalidRequestError, match="rank261"):
        write_planned(donor_path, variant_path, tmp_path / "out", {HEAD: parse_rung("rank261:4")})
    write_planned(donor_path, variant_path, tmp_path / "out", {HEAD: parse_rung("rank260:4")})
    DeltaFile.open(tmp_path / "out").close()


def test_delta_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    donor_path = make_checkpoint(tmp_path / "donor", tie=False)
    variant_path = make_variant(tmp_path / "variant", donor_path, scale=0.05)
    name = "model.layers.1.mlp.up_proj.weight"
    state = load_file(variant_path / "model.safetensors")
    rung = parse_rung("int4:64")
    write_planned(donor_path, variant_path, tmp_path / "delta", {name: rung})
    with DeltaFile.open(tmp_path / "delta") as delta:
        plan = delta.plan
    state[name][3, 4] = float("inf")
    save_file(state, variant_path / "model.safetensors")
    with (
        Checkpoint.open(donor_path) as donor,
        Checkpoint.open(variant_path) as variant,
        pytest.raises(BadCheckpointError, match=rf"{name}: .*not finite"),
    ):
        write_delta(plan, donor, variant, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_golden_bytes_of_a_small_file(tmp_path: Path) -> None:
    """What version 1 is, byte by byte; a change of these needs another version."""
    entries = [
        *entries_of("a", parse_rung("rank1:16+int2:32"), (3, 2), "BF16", num_rows=1),
        *entries_of("b", Rung.OWN, (1,), "F32", num_rows=0),
        *entries_of("c", Rung.ROWS, (9, 2), "F16", num_rows=1),
    ]
    plan, _ = write_random(tmp_path)
    with EntryWriter(tmp_path / "file", entries, plan) as writer:
        codes = torch.tensor([[0, 3], [2, 1]], dtype=torch.uint8)
        writer.put("a.dense.codes", pack_codes(codes, 2))
        writer.put("a.dense.scales", torch.tensor([[0.5], [2.0]]).bfloat16())
        writer.put("a.down.codes", torch.tensor([[1.0, -1.0]]).bfloat16().view(torch.uint8))
        writer.put("a.up.codes", torch.tensor([[0.0, 3.0]]).bfloat16().view(torch.uint8))
        writer.put("a.extra", torch.tensor([[4.0, 5.0]]).bfloat16())
        writer.put("b", torch.tensor([1.5]))
        writer.put("c.rows", torch.tensor([[1.0, 2.0]]).half())
        writer.put("c.positions", torch.tensor([7]))
    content = (tmp_path / "file").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    assert length % 8 == 0
    assert metadata == {
        "format": "linker-delta",
        "version": "1",
        "plan": json.dumps(plan.to_json(), separators=(",", ":")),
        "blake3": blake3(data).hexdigest(),
    }
    expected = {
        "c.positions": ("I64", [1], "0700000000000000"),
        "b": ("F32", [1], "0000c03f"),
        "a.dense.scales": ("BF16", [2, 1], "003f 0040"),
        "a.extra": ("BF16", [1, 2], "8040 a040"),
        "c.rows": ("F16", [1, 2], "003c 0040"),
        # Code 0 of row 0 is 0 and code 1 is 3, in bytes 0 and 1 of a run's 32; of row 1 2 and 1.
        "a.dense.codes": ("U8", [2, 32], "0003" + "00" * 30 + "0201" + "00" * 30),
        "a.down.codes": ("U8", [1, 4], "803f 80bf"),
        "a.up.codes": ("U8", [1, 4], "0000 4040"),
    }
    assert data == bytes.fromhex("".join(words for _, _, words in expected.values()))
    assert list(header) == list(expected)
    begin = 0
    for name, (dtype, shape, words) in expected.items():
        end = begin + len(bytes.fromhex(words))
        assert header[name] == {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end


def test_open_weights_tells_a_delta_from_a_checkpoint(tmp_path: Path) -> None:
    _, path = write_random(tmp_path)
    with open_weights(path) as delta, open_weights(tmp_path / "variant") as variant:
        assert isinstance(delta, DeltaFile)
        assert isinstance(variant, Checkpoint)
        assert delta.config == variant.config
