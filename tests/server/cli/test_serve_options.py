from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError
from server.cli.serve_options import add_arguments, settings_from, startup_requests
from server.settings import Settings


def settings(*arguments: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_from(parser.parse_args(arguments))


def test_models_are_taken_repeated_and_together(tmp_path: Path) -> None:
    tree = settings("--model", "a=x", "b=y", "--model", f"c={tmp_path}")
    requests = startup_requests(tree)
    assert [request.name for request in requests] == ["a", "b", "c"]
    assert [request.donor for request in requests] == [None, "a", "a"]
    assert requests[2].source == str(tmp_path)


def test_flags_become_settings(tmp_path: Path) -> None:
    tree = settings(
        *("--memory-budget", "2G", "--max-model-len", "128", "--device", "cuda", "--port", "0"),
        *("--tau-cos", "0.9", "--tau-frob", "0.1", "--state", "/s"),
        *("--models-root", str(tmp_path), "--matmul-precision", "medium"),
    )
    assert tree.engine.matmul_precision == "medium"
    assert tree.engine.to_engine_config().served_precision == "highest"  # of a CUDA device
    assert tree.engine.to_engine_config().memory_budget_bytes == 2 << 30
    assert (tree.engine.max_model_len, tree.engine.device) == (128, "cuda")
    assert (tree.sharing.tau_cos, tree.sharing.tau_frob) == (0.9, 0.1)
    assert (tree.storage.state, tree.models.root) == (Path("/s"), tmp_path)
    assert (tree.http.host, tree.http.port) == ("127.0.0.1", 0)


def test_thresholds_bind_variants_and_leave_the_donor_alone() -> None:
    requests = startup_requests(
        settings("--model", "a=x", "b=y", "--tau-cos", "0.9", "--tau-frob", "0.1")
    )
    assert [request.tau_cos for request in requests] == [None, 0.9]


@pytest.mark.parametrize(
    ("arguments", "policy"),
    [
        ((), "budget"),
        (("--budget-kl", "0.5"), "budget"),
        (("--max-bytes", "5M"), "bytes"),
        (("--tier", "Qwen2.5-3B"), "thresholds"),
        (("--policy", "thresholds", "--budget-kl", "0.5"), "thresholds"),
    ],
)
def test_sharing_options_of_a_start_imply_their_policy(
    arguments: tuple[str, ...], policy: str
) -> None:
    donor, variant = startup_requests(settings("--model", "a=x", "b=y", *arguments))
    assert variant.policy == policy
    assert (donor.budget_kl, donor.tier) == (None, None)
    assert variant.max_bytes == (5 << 20 if policy == "bytes" else None)


@pytest.mark.parametrize(
    ("file", "flags", "policy"),
    [
        ("tau_cos: 0.9, tau_frob: 0.1", (), "thresholds"),
        ("policy: thresholds", ("--budget-kl", "0.5"), "thresholds"),
        ("tau_cos: 0.9, tau_frob: 0.1", ("--budget-kl", "0.5"), "thresholds"),
        ("budget_kl: 0.5", ("--tier", "Qwen2.5-3B"), "thresholds"),
        ("policy: exact", ("--policy", "bytes", "--max-bytes", "1M"), "bytes"),
    ],
)
def test_file_and_flags_together_imply_the_policy(
    tmp_path: Path, file: str, flags: tuple[str, ...], policy: str
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"sharing: {{{file}}}\n")
    tree = settings("--config", str(config), "--model", "a=x", "b=y", *flags)
    assert startup_requests(tree)[1].policy == policy


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "a"), ("--model", "=x"), ("--model", "a="), ("--memory-budget", "lots"),
        ("--max-model-len", "0"), ("--port", "70000"),
        ("--config", "/nothing.yaml"), ("--models-root", "/nothing"),
    ],
)  # fmt: skip
def test_bad_flag_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        settings(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "a=x", "a=y"), ("--model", "../a=x"), ("--model", "jobs=x"),
        ("--model", "a=x", "b=y", "--tau-cos", "0.9"),
    ],
)  # fmt: skip
def test_bad_start_up_model_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        startup_requests(settings(*arguments))


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        (("--tau-cos", "0.9"), "tau_frob"),
        (("--tau-frob", "0.1", "--model", "a=x"), "tau_cos"),
        (("--tier", "nothing"), "tier"),
        (("--tier", "Qwen2.5-3B", "--tau-cos", "0.9", "--tau-frob", "0.1"), "tier"),
        (("--policy", "exact", "--tau-cos", "0.9", "--tau-frob", "0.1"), "tau_cos"),
        (("--policy", "budget", "--tier", "Qwen2.5-3B"), "tier"),
        (("--policy", "bytes"), "max_bytes"),
        (("--budget-kl", "0.1", "--max-bytes", "1M"), "budget_kl"),
        (("--calibration", "/nothing.jsonl"), "calibration"),
    ],
)
def test_sharing_that_plans_nothing_is_refused_at_the_start(
    arguments: tuple[str, ...], param: str
) -> None:
    # Even with one model or none: POST /models would inherit it.
    with pytest.raises(InvalidRequestError) as caught:
        startup_requests(settings(*arguments))
    assert caught.value.param == param
