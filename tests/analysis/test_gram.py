"""The pass over whole families: equal to stacking everything, and it stops where it must."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analysis import gram_sweep
from analysis.family import StudiedFamily
from analysis.gram import TensorGram, gram_pass
from analysis.gram_sweep import LEAST_RUN, MAX_RUNS, run_elements
from analysis.selection import select
from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.pace import Pace
from linker_core.weights.architecture import parse_config
from linker_core.weights.shapes import expected_tensors
from tests.analysis.plain_gram import plain_gram
from tests.analysis.planted import Planted, Structure, plant_family
from tests.tiny import make_variant, retyped, save_state

UP = "model.layers.0.mlp.up_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


def assert_plain(family: StudiedFamily, found: TensorGram, *, within: float = 1e-13) -> None:
    plain = plain_gram(family, found.name)
    norms = np.linalg.norm(plain.deltas_ND, axis=1)
    gap_NN = np.abs(found.gram_NN - plain.gram_NN)
    assert (gap_NN <= within * np.outer(norms, norms)).all()
    assert np.allclose(found.norms_N, norms, rtol=within)
    assert found.base_square == pytest.approx(plain.base_square, rel=within)
    bound_N = within * norms * found.base_square**0.5
    assert (np.abs(found.base_dots_N - plain.base_dots_N) <= bound_N).all()


@pytest.mark.parametrize("num_variants", [1, 2, 5, 7])
def test_gram_of_a_family_equals_that_of_the_stack(tmp_path: Path, num_variants: int) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=num_variants))
    with planted.open() as family:
        names = select(family.base, ["*"])
        found = list(gram_pass(family, names))
        assert tuple(gram.name for gram in found) == names
        for gram in found:
            assert gram.groups_CNN.shape[1:] == (num_variants, num_variants)
            assert_plain(family, gram)


def test_gram_of_mixed_types_equals_that_of_the_stack(
    small_family: Planted, tmp_path: Path
) -> None:
    one, two, three, *_ = small_family.variants.values()
    variants = {
        "half": retyped(tmp_path / "half", one, "float16"),
        "brain": retyped(tmp_path / "brain", two, "bfloat16"),
        "single": three,
    }
    with StudiedFamily.open(small_family.base, variants) as family:
        for gram in gram_pass(family, select(family.base)):
            assert gram.dtypes == ("F32", "F16", "BF16", "F32")
            assert_plain(family, gram)


def test_groups_are_contiguous_runs_of_elements(small_family: Planted) -> None:
    with small_family.open() as family:
        (gram,) = gram_pass(family, [UP])
        deltas_ND = plain_gram(family, UP).deltas_ND
    run = run_elements(deltas_ND.shape[1])
    assert len(gram.groups_CNN) == -(-deltas_ND.shape[1] // run)
    for number, group_NN in enumerate(gram.groups_CNN):
        part_ND = deltas_ND[:, run * number : run * (number + 1)]
        assert np.allclose(group_NN, part_ND @ part_ND.T, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [1, 48, 255, 256, 511, 513, 3_840, 16_385, 1_000_001, 1 << 29])
def test_runs_are_at_most_64_and_long_enough(count: int) -> None:
    run = run_elements(count)
    assert -(-count // run) <= MAX_RUNS
    assert run >= min(count, LEAST_RUN)


@pytest.mark.parametrize("piece_bytes", [1, 10_000, 40_000])
def test_pieces_of_any_size_give_the_same_sums(
    small_family: Planted, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(gram_sweep, "_PIECE_BYTES", piece_bytes)
    with small_family.open() as family:
        for gram in gram_pass(family, [UP, GATE]):
            assert_plain(family, gram)


@pytest.mark.parametrize(("cores", "mapped"), [(1, False), (4, False), (4, True)])
def test_every_bit_is_the_same_whoever_reads(
    small_family: Planted, monkeypatch: pytest.MonkeyPatch, cores: int, mapped: bool
) -> None:
    with small_family.open() as family:
        expected = list(gram_pass(family, select(family.base)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    monkeypatch.setattr(gram_sweep, "_SHARE_BYTES", 1)
    with small_family.open() as family:
        for gram, before in zip(
            gram_pass(family, select(family.base), mapped=mapped), expected, strict=True
        ):
            assert np.array_equal(gram.groups_CNN, before.groups_CNN)
            assert np.array_equal(gram.base_dots_N, before.base_dots_N)
            assert gram.base_square == before.base_square


def test_progress_ends_with_all_bytes(small_family: Planted) -> None:
    seen: list[tuple[int, int]] = []
    with small_family.open() as family:
        list(gram_pass(family, [UP, GATE], progress=lambda done, total: seen.append((done, total))))
        nbytes = sum(c.tensors[name].nbytes for c in family.checkpoints for name in (UP, GATE))
    assert max(seen) == (nbytes, nbytes)


def test_a_pass_left_early_ends_its_threads(small_family: Planted) -> None:
    before = threading.active_count()
    with small_family.open() as family:
        grams = gram_pass(family, select(family.base))
        next(grams)
        grams.close()  # type: ignore[attr-defined]
        assert threading.active_count() == before


def test_a_busy_pace_rests_between_pieces(
    small_family: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram_sweep, "_PIECE_BYTES", 40_000)
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    pace = Pace(bytes_per_s=1e6, clock=lambda: now, sleep=sleep)
    pace.busy = True
    with small_family.open() as family:
        list(gram_pass(family, [UP], pace=pace))
        nbytes = sum(c.tensors[UP].nbytes for c in family.checkpoints)
    pace.busy = False
    assert now >= nbytes / 1e6


@pytest.mark.parametrize("poisoned", ["base", "two"])
def test_weights_that_are_not_finite_name_the_model_and_its_file(
    small_family: Planted, tmp_path: Path, poisoned: str
) -> None:
    paths = {"base": small_family.base, **small_family.variants}
    source = paths[poisoned]
    paths[poisoned] = tmp_path / "poisoned"
    shutil.copytree(source, paths[poisoned])
    state = load_file(source / "model.safetensors")
    state[GATE][3, 5] = torch.nan
    save_state(paths[poisoned], state)
    base = paths.pop("base")
    with StudiedFamily.open(base, paths) as family:
        grams = gram_pass(family, [UP, GATE])
        assert next(grams).name == UP
        with pytest.raises(BadCheckpointError, match=rf"poisoned: model\.safe.*{GATE}.*NaN"):
            next(grams)


def test_a_file_cut_short_while_it_is_read_is_refused(
    small_family: Planted, tmp_path: Path
) -> None:
    cut = shutil.copytree(small_family.variants["one"], tmp_path / "cut")
    with StudiedFamily.open(small_family.base, {"cut": cut}) as family:
        os.truncate(cut / "model.safetensors", 5_000)
        with pytest.raises(BadCheckpointError, match="shorter"):
            list(gram_pass(family, select(family.base)))


def test_a_tensor_of_another_shape_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=1))
    more = make_variant(tmp_path / "more", planted.base, scale=0.0, added_tokens=["<x>"])
    with (
        StudiedFamily.open(planted.base, planted.variants | {"more": more}) as family,
        pytest.raises(InvalidRequestError, match=r"more has it as \[513, 48\]"),
    ):
        gram_pass(family, [UP, "model.embed_tokens.weight"])


def test_a_pass_imports_nothing_heavy(small_family: Planted) -> None:
    one = small_family.variants["one"]
    program = (
        "import sys; from pathlib import Path\n"
        "from analysis.family import StudiedFamily\n"
        "from analysis.gram import gram_pass\n"
        "from analysis.selection import select\n"
        f"with StudiedFamily.open(Path({str(small_family.base)!r}), {{'v': Path({str(one)!r})}}) "
        "as family:\n"
        "    assert list(gram_pass(family, select(family.base)))\n"
        "assert not {'torch', 'numba', 'scipy', 'plotly'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.shared
def test_gram_of_trained_models_equals_that_of_the_stack(shared: Path) -> None:
    folder = shared / "families" / "mini-qwen2"
    variants = {name: folder / name for name in ("chat", "code", "instruct", "math")}
    with StudiedFamily.open(folder / "base", variants) as family:
        names = select(family.base)
        found = list(gram_pass(family, names, mapped=True))
        assert len(found) == len(names) == 56
        for gram in found[:7]:
            assert_plain(family, gram)


def test_memory_does_not_grow_with_the_tensor(small_family: Planted, tmp_path: Path) -> None:
    record = json.loads((small_family.base / "config.json").read_text())
    record |= {"vocab_size": 1 << 21, "dtype": "bfloat16"}  # an embedding of 192 MiB
    paths = [sparse_checkpoint(tmp_path / name, record) for name in ("base", "one", "two")]
    program = (
        "import sys; from pathlib import Path\n"
        "from analysis.family import StudiedFamily\n"
        "from analysis.gram import gram_pass\n"
        "from server.cli.bench.memory import private_bytes\n"
        "import os\n"
        "base, one, two = map(Path, sys.argv[1:])\n"
        "most = 0\n"
        "def look(done, total):\n"
        "    global most\n"
        "    most = max(most, private_bytes(os.getpid()))\n"
        "with StudiedFamily.open(base, {'one': one, 'two': two}) as family:\n"
        "    assert list(gram_pass(family, ['model.embed_tokens.weight'], progress=look))\n"
        "print(most)\n"
    )
    command = [sys.executable, "-c", program, *map(str, paths)]
    most = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert 1 << 20 < most < 128 << 20


def sparse_checkpoint(path: Path, record: dict[str, object]) -> Path:
    """A checkpoint of zeros that takes no room on disk."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(record))
    header, end = {}, 0
    for name, shape in expected_tensors(parse_config(record)).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path
