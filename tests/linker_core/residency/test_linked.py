"""`load_linked` and skeletons against plain transformers: same arithmetic, same storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from linker_core import load_linked
from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.residency.linked import load_plain
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant

UP = "model.layers.1.mlp.up_proj.weight"


def load(path: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(5, 45)[None]).logits
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_load_plain_equals_transformers(tmp_path: Path, architecture: str, tie: bool) -> None:
    path = make_checkpoint(
        tmp_path / "m", architecture=architecture, tie=tie, dtype="float32", layers=3
    )
    torch.testing.assert_close(logits(load_plain(path)), logits(load(path)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_linked_equals_the_variant_with_the_donors_blocks(
    tmp_path: Path, architecture: str
) -> None:
    donor_path = make_checkpoint(tmp_path / "d", architecture=architecture, dtype="float32")
    scale = {"model.layers.0.mlp.down_proj.weight": 0.1, UP: 0.9, "model.norm.weight": 0.3}
    path = make_variant(tmp_path / "v", donor_path, scale=scale)
    donor = load(donor_path)
    linked = load_linked(path, donor, tau_cos=0.99, tau_frob=0.05)
    reference = load(path)
    block_0 = {k: v for k, v in donor.state_dict().items() if k.startswith("model.layers.0.")}
    assert block_0
    reference.load_state_dict(block_0, strict=False)
    torch.testing.assert_close(logits(linked), logits(reference), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(linked), logits(load(path)), atol=1e-3)


def test_load_linked_parameter_is_the_donors_storage(tmp_path: Path) -> None:
    donor_path = make_checkpoint(tmp_path / "d")
    donor = load(donor_path)
    linked = load_linked(make_variant(tmp_path / "v", donor_path, scale={UP: 0.9}), donor)
    shared = dict(linked.named_parameters())
    theirs = dict(donor.named_parameters())
    aliased = {n for n in shared if shared[n].data_ptr() == theirs[n].data_ptr()}
    assert aliased == {n for n in theirs if n.startswith("model.layers.0.")}
    assert linked.lm_head.weight is linked.model.embed_tokens.weight


def test_load_linked_exact_aliases_equal_tensors_and_changes_no_logit(tmp_path: Path) -> None:
    donor_path = make_checkpoint(tmp_path / "d")
    path = make_variant(tmp_path / "v", donor_path, scale={UP: 0.01})
    linked = load_linked(path, donor_path, policy="exact")
    assert torch.equal(logits(linked), logits(load(path)))


def test_load_linked_takes_the_donors_type(tmp_path: Path) -> None:
    donor_path = make_checkpoint(tmp_path / "d")
    path = make_variant(tmp_path / "v", donor_path, scale=0.5)
    linked = load_linked(path, load(donor_path, torch.float32))
    assert {p.dtype for p in linked.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(linked), logits(load(path, torch.float32)))


def test_load_linked_generates_with_the_variants_own_stop_ids(tmp_path: Path) -> None:
    donor_path = make_checkpoint(tmp_path / "d")
    linked = load_linked(make_variant(tmp_path / "v", donor_path, scale=0.01), donor_path)
    generation = linked.generation_config
    assert generation is not None
    assert generation.eos_token_id == [2]
    generated = linked.generate(torch.tensor([[7]]), max_new_tokens=3)  # type: ignore[operator]
    assert generated.shape[1] <= 4


def test_load_linked_donor_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "d")
    donor = load(path)
    donor.name_or_path = "org/name"
    with pytest.raises(BadCheckpointError, match="from_pretrained"):
        load_linked(path, donor)


def test_load_linked_half_given_thresholds_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "d")
    with pytest.raises(InvalidRequestError, match="tau_frob"):
        load_linked(path, path, tau_cos=0.9)


@pytest.mark.parametrize("policy", ["budget", "donor", "all"])
def test_load_linked_unknown_policy_is_refused(tmp_path: Path, policy: str) -> None:
    path = make_checkpoint(tmp_path / "d")
    with pytest.raises(InvalidRequestError, match="thresholds"):
        load_linked(path, path, policy=policy)
