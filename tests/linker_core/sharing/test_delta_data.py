"""What only reading a delta's data shows, and what only its donor shows."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest

from linker_core.errors import BadCheckpointError
from linker_core.pace import Pace
from linker_core.sharing import delta_data
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_data import check_data, check_donor
from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.sharing.delta_edits import (
    CODES,
    EMBED,
    FACTORS,
    HEAD,
    NORM,
    edit_entry,
    edit_plan,
    read_delta,
    write_header,
    write_small,
)
from tests.tiny import make_checkpoint

NAN, INFINITY, MINUS = b"\xc0\x7f", b"\x80\xff", b"\x80\xbf"  # bfloat16: NaN, -inf, -1


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("deltas"))


@pytest.fixture
def path(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "delta"))


def data_refused(path: Path, why: str) -> None:
    with DeltaFile.open(path) as delta, pytest.raises(BadCheckpointError, match=why):
        check_data(delta)


@pytest.mark.parametrize("busy", [True, False])
def test_honest_data_passes_and_progress_ends_at_its_size(path: Path, busy: bool) -> None:
    seen: list[tuple[int, int]] = []
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    pace = Pace(clock=lambda: now, sleep=sleep)
    pace.busy = busy
    with DeltaFile.open(path) as delta:
        check_data(delta, progress=lambda done, total: seen.append((done, total)), pace=pace)
        pace.busy = False
        assert seen == sorted(seen)
        assert seen[-1] == (delta.nbytes, delta.nbytes)
    assert (now > 0) == busy


def test_every_flipped_byte_is_found(path: Path) -> None:
    """A prime step reaches each kind of entry; every one of them is in the digest."""
    header, data = read_delta(path)
    for place in range(0, len(data), 997):
        data[place] ^= 1
        write_header(path, header, bytes(data))
        data_refused(path, DELTA_FILE)
        data[place] ^= 1


@pytest.mark.parametrize("words", [NAN, INFINITY])
@pytest.mark.parametrize(
    "name",
    [
        NORM, f"{CODES}.dense.scales", f"{CODES}.down.scales", f"{FACTORS}.down.codes",
        f"{FACTORS}.up.codes", f"{EMBED}.rows", f"{HEAD}.extra",
    ],
)  # fmt: skip
def test_number_that_is_not_finite_is_refused(path: Path, name: str, words: bytes) -> None:
    edit_entry(path, name, words, offset=2)
    data_refused(path, f"{name} has NaN or infinite")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sign", ["", "-"])
def test_infinity_of_other_types_is_refused(tmp_path: Path, dtype: str, sign: str) -> None:
    path = write_small(tmp_path, dtype=dtype)
    with DeltaFile.open(path) as delta:
        check_data(delta)
    form = {"float16": "<e", "float32": "<f"}[dtype]
    edit_entry(path, NORM, struct.pack(form, float(f"{sign}inf")))
    data_refused(path, f"{NORM} has NaN or infinite")


def test_negative_scale_is_refused_and_negative_weight_is_not(path: Path) -> None:
    edit_entry(path, NORM, MINUS)
    with DeltaFile.open(path) as delta:
        check_data(delta)
    edit_entry(path, f"{CODES}.dense.scales", MINUS)
    data_refused(path, "negative scales")


@pytest.mark.parametrize(
    "positions", [(512, 512), (513, 512), (-1, 512), (512, 514), (512, 2**62), (-(2**63), 0)]
)
def test_positions_out_of_order_or_range_are_refused(
    path: Path, positions: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_entry(path, f"{EMBED}.positions", struct.pack("<2q", *positions))
    data_refused(path, "does not ascend")
    monkeypatch.setattr(delta_data, "_CHUNK_BYTES", 8)  # each position in a chunk of its own
    data_refused(path, "does not ascend")


@pytest.mark.parametrize("positions", [(0, 513), (0, 512), (1, 2)])
def test_rows_that_the_donor_lacks_are_all_there_or_it_is_refused(
    path: Path, honest: Path, positions: tuple[int, int]
) -> None:
    edit_entry(path, f"{EMBED}.positions", struct.pack("<2q", *positions))
    with DeltaFile.open(path) as delta, Checkpoint.open(honest.parent / "donor") as donor:
        check_data(delta)
        with pytest.raises(BadCheckpointError, match=r"embed_tokens.weight does not fit"):
            check_donor(delta, donor)


def test_file_that_became_shorter_is_refused(path: Path) -> None:
    with DeltaFile.open(path) as delta:
        os.truncate(path / DELTA_FILE, (path / DELTA_FILE).stat().st_size - 1)
        with pytest.raises(BadCheckpointError, match="became shorter"):
            check_data(delta)


def test_donor_fits(honest: Path) -> None:
    with DeltaFile.open(honest) as delta, Checkpoint.open(honest.parent / "donor") as donor:
        check_donor(delta, donor)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architecture": "llama"}, "no fine-tune of this donor"),
        ({"layers": 3}, "no fine-tune of this donor"),
        ({"vocab_size": 511}, "embed_tokens.weight does not fit"),
        ({"vocab_size": 513}, "lm_head.weight does not fit"),
        ({"tie": True}, "lm_head.weight does not fit: the donor has none"),
        ({"dtype": "float16"}, "embed_tokens.weight does not fit: the donor's is F16"),
        ({"dtype": "float32"}, "embed_tokens.weight does not fit: the donor's is F32"),
    ],
)
def test_other_donor_is_refused(
    honest: Path, tmp_path: Path, change: dict[str, object], why: str
) -> None:
    other = make_checkpoint(tmp_path / "other", **({"tie": False} | change))  # type: ignore[arg-type]
    with (
        DeltaFile.open(honest) as delta,
        Checkpoint.open(other) as donor,
        pytest.raises(BadCheckpointError, match=why),
    ):
        check_donor(delta, donor)


def test_donor_that_lends_other_bytes_than_the_plan_says_is_refused(path: Path) -> None:
    def lie(plan: dict[str, int]) -> None:
        plan["logical_bytes"] += 2
        plan["shared_bytes"] += 2

    edit_plan(path, lie)
    donor_path = path.parent / "donor"
    make_checkpoint(donor_path, tie=False)
    with (
        DeltaFile.open(path) as delta,
        Checkpoint.open(donor_path) as donor,
        pytest.raises(BadCheckpointError, match="logical_bytes"),
    ):
        check_donor(delta, donor)
