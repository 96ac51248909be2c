from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from linker_core.errors import BadCheckpointError
from linker_core.pace import Pace
from linker_core.sharing import pieces
from linker_core.sharing.report import Region, ScanReport, region
from linker_core.sharing.scan import check_finite, scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint
from tests.tiny import make_checkpoint, make_variant

UP = "model.layers.1.mlp.up_proj.weight"


def scanned(donor: Path, variant: Path) -> ScanReport:
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        return scan(a, b)


def test_scan_block_is_the_mean_over_all_k_sub_parameters(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", dtype="float32")
    variant = make_variant(tmp_path / "v", donor, scale={UP: 0.12})
    report = scanned(donor, variant)
    # K = 12 for Qwen2: seven products, three biases, two norms; one of them moved by 12 %.
    assert len(report.blocks[1].params) == 12
    assert report.blocks[1].epsilon == pytest.approx(0.12 / 12, rel=1e-6)
    assert report.blocks[0].epsilon == 0.0
    assert report.blocks[0].cos == 1.0
    assert report.mean_epsilon == pytest.approx(0.12 / 24, rel=1e-6)
    params = report.blocks[1].params
    assert [n for n, s in params.items() if not s.identical] == ["mlp.up_proj.weight"]


def test_scan_reads_every_shared_tensor_of_both(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", tie=False)
    variant = make_variant(tmp_path / "v", donor, scale=0.01)
    seen: list[tuple[int, int]] = []
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        report = scan(a, b, progress=lambda done, total: seen.append((done, total)))
        assert report.bytes_read == a.nbytes + b.nbytes == seen[-1][1]
    assert max(done for done, _ in seen) == report.bytes_read
    assert set(report.outside_blocks) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_scan_other_vocabulary_leaves_embedding_out(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.01, added_tokens=("<a>", "<b>"))
    assert set(scanned(donor, variant).outside_blocks) == {"model.norm.weight"}


def test_scan_counts_the_rows_that_are_the_donors(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", tie=False)
    variant = make_variant(tmp_path / "v", donor, scale=0.0, added_tokens=("<a>", "<b>"))
    file = variant / "model.safetensors"
    state = load_file(file)
    state["model.embed_tokens.weight"][[0, 7, 511], -1] += 1.0
    state["lm_head.weight"][3, 0] *= -1.0
    save_file(state, file)
    report = scanned(donor, variant)
    assert report.identical_rows == {"model.embed_tokens.weight": 509, "lm_head.weight": 511}
    swapped = scanned(variant, donor)  # fewer rows than the donor has
    assert swapped.identical_rows == report.identical_rows
    assert scanned(donor, donor).identical_rows == dict.fromkeys(report.identical_rows, 512)


def test_scan_of_an_untied_head_counts_only_what_both_hold(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied")
    untied = make_checkpoint(tmp_path / "untied", tie=False)
    assert set(scanned(tied, untied).identical_rows) == {"model.embed_tokens.weight"}


def test_scan_of_another_type_counts_no_rows(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_checkpoint(tmp_path / "v", dtype="float16")
    assert scanned(donor, variant).identical_rows == {}


@pytest.mark.parametrize("elements", [1, 48, 1000, 1 << 20])
def test_scan_in_pieces_of_any_size_through_maps_or_buffers_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    donor = make_checkpoint(tmp_path / "d", vocab_size=300)
    variant = make_variant(tmp_path / "v", donor, scale=0.03)
    whole = scanned(donor, variant)
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", elements)
    for mapped in (True, False):
        with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
            report = scan(a, b, mapped=mapped)
        assert report.mean_cos == pytest.approx(whole.mean_cos, rel=1e-12)
        assert report.mean_epsilon == pytest.approx(whole.mean_epsilon, rel=1e-12)
        assert report.identical_rows == whole.identical_rows


def test_scan_while_sequences_run_gives_the_same(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.03)
    rests = [0.0]
    pace = Pace(sleep=rests.append, clock=lambda: sum(rests))
    pace.busy = True
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        report = scan(a, b, pace=pace)
        digest = fingerprint(b, pace=pace, mapped=True)
    pace.busy = False
    assert sum(rests) > report.bytes_read / 1e9  # at the default rate
    assert report.blocks == scanned(donor, variant).blocks
    with Checkpoint.open(variant) as b:
        assert digest == fingerprint(b)


def test_scan_of_a_file_that_shrinks_is_an_error_where_files_are_read(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.03)
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        os.truncate(variant / "model.safetensors", 1 << 14)
        with pytest.raises(BadCheckpointError, match="shorter"):
            scan(a, b)


def test_scan_of_a_file_cut_before_it_is_mapped_is_an_error(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_variant(tmp_path / "v", donor, scale=0.03)
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        os.truncate(variant / "model.safetensors", 1 << 14)
        with pytest.raises(BadCheckpointError, match="shorter"):
            scan(a, b, mapped=True)


def test_scan_other_float_type_is_compared_by_value(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_checkpoint(tmp_path / "v")
    state = load_file(variant / "model.safetensors")
    save_file({k: t.float() for k, t in state.items()}, variant / "model.safetensors")
    report = scanned(donor, variant)
    assert report.mean_epsilon == 0.0
    assert not any(s.identical for block in report.blocks for s in block.params.values())


@pytest.mark.parametrize("changes", [{"layers": 3}, {"hidden": 56}, {"architecture": "llama"}])
def test_scan_of_another_family_lists_the_differences(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    donor = make_checkpoint(tmp_path / "d")
    variant = make_checkpoint(tmp_path / "v", **changes)  # type: ignore[arg-type]
    with pytest.raises(BadCheckpointError, match=r"donor .* variant"):
        scanned(donor, variant)


@pytest.mark.parametrize("poisoned", ["d", "v"])
@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight"])
def test_scan_refuses_nonfinite_weights_of_either(tmp_path: Path, poisoned: str, name: str) -> None:
    donor = make_checkpoint(tmp_path / "d")
    make_variant(tmp_path / "v", donor, scale=0.01, added_tokens=("<a>",))
    file = tmp_path / poisoned / "model.safetensors"
    state = load_file(file)
    state[name].view(-1)[7] = float("nan")
    save_file(state, file)
    with (
        Checkpoint.open(tmp_path / poisoned) as alone,
        pytest.raises(BadCheckpointError, match="NaN"),
    ):
        check_finite(alone)
    with pytest.raises(BadCheckpointError, match=name.replace(".", r"\.")):
        scanned(tmp_path / "d", tmp_path / "v")


def test_report_survives_json(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d")
    report = scanned(donor, make_variant(tmp_path / "v", donor, scale=0.03))
    record = json.loads(json.dumps(report.to_json()))
    assert ScanReport.from_json(record) == report
    assert set(record) >= {
        "donor", "variant", "bytes_read", "scan_seconds", "mean_cos", "mean_epsilon", "region",
        "blocks",
    }  # fmt: skip
    assert set(record["blocks"][0]) >= {"index", "cos", "epsilon", "params"}


@pytest.mark.parametrize(
    ("cos", "epsilon", "expected"),
    [
        (0.9997, 0.015, Region.ALIGNED),
        (0.99, 0.10, Region.ALIGNED),
        (0.9899, 0.01, Region.BOUNDARY),
        (0.993, 0.156, Region.BOUNDARY),
        (0.97, 0.25, Region.BOUNDARY),
        (0.637, 0.831, Region.OUTSIDE),
        (0.98, 0.26, Region.OUTSIDE),
    ],
)
def test_region_of_means(cos: float, epsilon: float, expected: Region) -> None:
    assert region(cos, epsilon) is expected


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "cos", "epsilon", "expected"),
    [
        ("instruct", 0.9984, 0.044, Region.ALIGNED),
        ("chat", 0.9989, 0.036, Region.ALIGNED),
        ("math", 0.9966, 0.068, Region.ALIGNED),
        ("code", 0.938, 0.343, Region.OUTSIDE),
    ],
)
def test_scan_of_trained_family_gives_its_known_means(
    shared: Path, name: str, cos: float, epsilon: float, expected: Region
) -> None:
    family = shared / "families" / "mini-qwen2"
    report = scanned(family / "base", family / name)
    assert report.mean_cos == pytest.approx(cos, abs=6e-4)
    assert report.mean_epsilon == pytest.approx(epsilon, abs=6e-4)
    assert report.region is expected
