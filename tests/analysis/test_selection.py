"""Which tensors a study looks at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from analysis.selection import Component, component_of, layer_of, select
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from tests.analysis.planted import Planted


@pytest.fixture
def base(small_family: Planted) -> Iterator[Checkpoint]:
    with Checkpoint.open(small_family.base) as checkpoint:
        yield checkpoint


def test_select_without_globs_gives_seven_projections_of_each_layer(base: Checkpoint) -> None:
    names = select(base)
    assert len(names) == 7 * base.config.num_layers
    for layer in range(base.config.num_layers):
        found = {component_of(name) for name in names if layer_of(name) == layer}
        assert found == set(Component)


def test_select_by_globs_gives_each_match_once_in_the_checkpoints_order(base: Checkpoint) -> None:
    names = select(base, ["*.1.mlp.*", "*down_proj*"])
    assert names == tuple(name for name in base.tensors if ".1.mlp." in name or "down_proj" in name)


def test_select_by_a_glob_without_match_names_what_is_near(base: Checkpoint) -> None:
    with pytest.raises(InvalidRequestError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        select(base, ["*norm*", "model.layers.0.mlp.upp_proj.weight"])


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.input_layernorm.weight", "x",
     "model.embed_tokens.weight"],
)  # fmt: skip
def test_component_of_what_is_no_projection_is_none(name: str) -> None:
    assert component_of(name) is None


def test_components_are_four_of_attention_and_three_of_the_mlp() -> None:
    assert [c.value for c in Component if c.is_attention] == ["q", "k", "v", "o"]
    assert [c.value for c in Component if not c.is_attention] == ["gate", "up", "down"]
