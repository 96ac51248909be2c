"""Which models a command line means."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError, LinkerError, ModelNotFoundError
from server.cli.analyze.members import (
    Members,
    add_member_arguments,
    add_tensor_arguments,
    find_members,
    selected,
)
from server.cli.main import main
from server.registry.lock import make_state
from server.registry.records import ModelRecord, ModelState
from server.registry.store import Registry
from tests.analysis.planted import Planted
from tests.server.keyed import registry_url
from tests.server.live import live_server


def members(*words: str | Path) -> Members:
    return find_members(parsed(*words))


def parsed(*words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_member_arguments(parser)
    add_tensor_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def record(name: str, source: Path, **fields: object) -> ModelRecord:
    known: dict[str, object] = {"state": ModelState.READY, "family": "acme/base", "position": 0}
    row = {"name": name, "source": str(source), "request": {}, "created_at": 0.0}
    return ModelRecord(**(row | known | fields))  # type: ignore[arg-type]


def served(state: Path, *records: ModelRecord) -> Path:
    make_state(state)
    registry = Registry.open(registry_url(state))
    registry.save(*records)
    registry.close()
    return state


def test_folders_are_called_as_they_are_named_or_as_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a/base", "a/one", "b/one", "b"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    found = members("a/base", "a/one/", "chat=b/one", "a=b")
    assert (found.base_name, found.base) == ("base", Path("a/base"))
    assert found.variants == {"one": Path("a/one"), "chat": Path("b/one"), "a": Path("b")}


def test_two_folders_of_one_name_are_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidRequestError, match=r"Two models are called one.*OTHER=b/one"):
        members("a/base", "a/one", "b/one")


def test_a_base_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="name one or more fine-tunes"):
        members(tmp_path)


def test_a_served_family_is_found_in_the_registry(small_family: Planted, tmp_path: Path) -> None:
    one, two, *_ = small_family.names
    adapter, gone = tmp_path / "adapter", tmp_path / "gone"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    state = served(
        tmp_path / "state",
        record("acme/base", small_family.base, donor=None),
        record("acme/one", small_family.variants[one], state=ModelState.UNLOADED),
        record("acme/two", small_family.variants[two]),
        record("acme/lora", adapter),
        record("acme/delta", gone, plan={"policy": "delta"}),
        record("acme/bad", gone, state=ModelState.FAILED),
        record("other", gone, family=None),
    )
    found = members("acme/base", "--state", state)
    assert set(found.variants) == {"acme/one", "acme/two"}
    assert [note.split()[0] for note in found.notes] == ["acme/lora", "acme/delta", "acme/bad"]
    with found.open() as family:
        assert family.base.path == small_family.base
        one_glob = parsed("x", "--tensors", "*.0.mlp.up*")
        assert selected(one_glob, family) == ("model.layers.0.mlp.up_proj.weight",)


def test_a_study_of_a_served_family_reads_the_registry(
    small_family: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [record(f"acme/{name}", path) for name, path in small_family.variants.items()]
    base = record("acme/base", small_family.base, donor=None)
    state = served(tmp_path / "state", base, *variants)
    options = ["--state", str(state), "--tensors", "*.0.mlp.*", "--draws", "19", "--json"]
    assert main(["analyze", "pca", "acme/base", *options]) == 0
    found = json.loads(capsys.readouterr().out)["summary"]
    assert found["base"] == "acme/base"
    assert list(found["variants"]) == [one.name for one in variants]


def test_every_family_of_a_study_may_be_a_served_one(
    small_family: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [record(f"acme/{name}", path) for name, path in small_family.variants.items()]
    state = served(
        tmp_path / "state", record("acme/base", small_family.base, donor=None), *variants
    )
    text = tmp_path / "text.txt"
    text.write_text("Plain words, one after another. " * 8)
    folders = [str(small_family.base), *map(str, list(small_family.variants.values())[:2])]
    options = ["--state", str(state), "--tensors", "*.0.mlp.up*", "--wikitext", str(text), "--json"]
    for target, source in ((folders, ["acme/base"]), (["acme/base"], folders)):
        assert main(["analyze", "transfer", *target, "--source", *source, *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["num_tensors"] == 1
        assert any("acme/one, acme/two" in note for note in found["notes"])


@pytest.mark.parametrize("study", ["pca", "stability", "diagnose", "kernel", "eval", "report"])
def test_help_says_where_a_served_family_is_looked_up(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["analyze", study, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "a server of this machine serves, looked up in its registry" in said
    assert "the server's state directory, which holds its registry" in said


def test_a_family_is_found_while_its_server_runs(small_family: Planted, tmp_path: Path) -> None:
    one, two, *_ = small_family.names
    with live_server(
        tmp_path / "state", models={"base": small_family.base}, root=small_family.base.parent
    ) as live:
        for name in (one, two):
            taken = live.onboard(f"acme/{name}", small_family.variants[name], donor="base")
            assert taken.status_code == 201, taken.text
        found = members("base", "--state", tmp_path / "state")
    assert found.base == small_family.base
    assert found.variants == {f"acme/{name}": small_family.variants[name] for name in (one, two)}
    assert found.notes == ()


def test_an_unknown_family_is_refused_with_a_near_name(tmp_path: Path) -> None:
    state = served(tmp_path / "state", record("acme/base", tmp_path))
    with pytest.raises(ModelNotFoundError, match="Did you mean 'acme/base'"):
        members("acme/bse", "--state", state)


def test_a_family_whose_base_failed_is_refused_with_the_reason(tmp_path: Path) -> None:
    state = served(tmp_path / "state", record("acme/base", tmp_path, state=ModelState.FAILED))
    with pytest.raises(LinkerError, match="acme/base is failed"):
        members("acme/base", "--state", state)


def test_a_family_without_a_registry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no registry"):
        members("acme/base", "--state", tmp_path / "nowhere")


@pytest.mark.parametrize("number", [0, 1])
def test_a_name_among_folders_is_refused_with_where_it_belongs(tmp_path: Path, number: int) -> None:
    words = [str(tmp_path)]
    words.insert(number, "acme/base")
    with pytest.raises(InvalidRequestError, match=r"no folder acme/base.*stands alone"):
        members(*words)


def test_a_base_alone_is_told_how_many_fine_tunes_a_study_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for study, least in {
        "pca": "two",
        "stability": "three",
        "kernel": "two",
        "diagnose": "one",
    }.items():
        assert main(["analyze", study, str(tmp_path)]) == 2
        assert f"name {least} or more fine-tunes" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["analyze", study, "--help"])
        assert f"BASE and {least} or more VARIANT" in " ".join(capsys.readouterr().out.split())


def test_folders_take_no_registry(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="folders need neither"):
        members("a", "b", "--state", tmp_path)
