"""The three controls of BS 3.3: the same function, and what cosine and ε make of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.probes import head_permutation, mlp_permutation, rmsnorm_rescaling, symmetry
from analysis.probes.block_function import BlockFunction
from analysis.probes.blocks import ATTENTION, MLP, PROJECTIONS, Block, distance, read_block
from analysis.probes.result import ProbeResult, Value
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from tests.analysis.probes.columns import fact, numbers, records
from tests.tiny import ARCHITECTURES, make_checkpoint

ROUND_OFF = 2e-6  # of the largest output: some tens of float32's 1.2e-7
SYMMETRIES: tuple[symmetry.Symmetry, ...] = (
    mlp_permutation.permute_neurons,
    head_permutation.permute_heads,
    rmsnorm_rescaling.rescale_channels,
)
MEASURES: tuple[Callable[..., ProbeResult], ...] = (
    mlp_permutation.measure,
    head_permutation.measure,
    rmsnorm_rescaling.measure,
)


@pytest.fixture
def config(family: StudiedFamily) -> ModelConfig:
    return family.base.config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("change", SYMMETRIES)
def test_a_symmetry_changes_weights_and_keeps_the_function(
    tmp_path: Path, architecture: str, change: symmetry.Symmetry
) -> None:
    path = make_checkpoint(tmp_path / "m", architecture=architecture, dtype="float32")
    with Checkpoint.open(path) as checkpoint:
        block = read_block(checkpoint, 1)
        config = checkpoint.config
    function = BlockFunction(config, 1, seed=0)
    changed = change(block, config, np.random.default_rng(0))
    before, after = function(block), function(changed)
    assert any(not np.array_equal(block[name], changed[name]) for name in block)
    assert np.abs(after - before).max() <= ROUND_OFF * np.abs(before).max()


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (mlp_permutation.permute_neurons, "mlp.up_proj.weight"),
        (head_permutation.permute_heads, "self_attn.k_proj.weight"),
        (rmsnorm_rescaling.rescale_channels, "self_attn.v_proj.weight"),
    ],
)
def test_a_symmetry_with_one_tensor_forgotten_is_another_function(
    family: StudiedFamily, change: symmetry.Symmetry, left_out: str
) -> None:
    def careless(
        block: Block, config: ModelConfig, rng: np.random.Generator
    ) -> dict[str, NDArray[np.float32]]:
        return change(block, config, rng) | {left_out: block[left_out]}

    result = symmetry.Control(symmetry=careless, title="", parts=(MLP,)).measure(family)
    assert fact(result, "worst_relative_change") > 1e-3


def test_block_function_of_gemma_2_caps_its_attention(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", architecture="gemma2", dtype="float32")
    with Checkpoint.open(path) as checkpoint:
        block = read_block(checkpoint, 1)
        config = checkpoint.config
    assert config.attn_logit_softcapping == 3.0
    wide = replace(config, attn_logit_softcapping=1e6)  # of no effect
    without = replace(config, attn_logit_softcapping=None)
    capped, high, none = (BlockFunction(each, 1, seed=0)(block) for each in (config, wide, without))
    assert np.abs(high - none).max() <= ROUND_OFF * np.abs(none).max()
    assert np.abs(capped - none).max() > 1e-2 * np.abs(none).max()


def test_neurons_move_together_in_gate_up_and_down(config: ModelConfig) -> None:
    width = config.intermediate_size
    neurons = np.arange(width, dtype=np.float32)
    block = {
        "mlp.gate_proj.weight": neurons[:, None],
        "mlp.up_proj.weight": 10 * neurons[:, None],
        "mlp.down_proj.weight": 100 * neurons[None, :],
        "self_attn.q_proj.weight": neurons[:, None],
    }
    moved = mlp_permutation.permute_neurons(block, config, np.random.default_rng(0))
    order = moved["mlp.gate_proj.weight"][:, 0]
    assert sorted(order) == list(range(width))
    assert not np.array_equal(order, neurons)
    np.testing.assert_array_equal(moved["mlp.up_proj.weight"][:, 0], 10 * order)
    np.testing.assert_array_equal(moved["mlp.down_proj.weight"][0], 100 * order)
    np.testing.assert_array_equal(moved["self_attn.q_proj.weight"], neurons[:, None])


def _numbered_heads(config: ModelConfig) -> Block:
    """Every row of a head (every column of o) holds the head's number."""
    heads = np.repeat(np.arange(config.num_heads, dtype=np.float32), config.head_dim)
    groups = np.repeat(np.arange(config.num_kv_heads, dtype=np.float32), config.head_dim)
    return {
        "self_attn.q_proj.weight": heads[:, None],
        "self_attn.q_proj.bias": heads,
        "self_attn.k_proj.weight": groups[:, None],
        "self_attn.v_proj.bias": groups,
        "self_attn.o_proj.weight": heads[None, :],
        "self_attn.o_proj.bias": heads,
    }


def test_heads_keep_to_their_group_and_no_group_stays(config: ModelConfig) -> None:
    shape = replace(config, num_heads=12, num_kv_heads=3, head_dim=2)
    for seed in range(20):
        moved = head_permutation.permute_heads(
            _numbered_heads(shape), shape, np.random.default_rng(seed)
        )
        q = moved["self_attn.q_proj.bias"].reshape(12, 2)
        kv = moved["self_attn.v_proj.bias"].reshape(3, 2)
        assert all(kv[place, 0] != place for place in range(3))
        assert sorted(q[:, 0]) == list(range(12))
        # Four query heads a group: those at a group's place are the ones its new keys serve.
        np.testing.assert_array_equal(q[:, 0] // 4, np.repeat(kv[:, 0], 4))
        np.testing.assert_array_equal(moved["self_attn.q_proj.weight"][:, 0], q.ravel())
        np.testing.assert_array_equal(moved["self_attn.o_proj.weight"][0], q.ravel())
        np.testing.assert_array_equal(moved["self_attn.k_proj.weight"][:, 0], kv.ravel())
        np.testing.assert_array_equal(
            moved["self_attn.o_proj.bias"], _numbered_heads(shape)["self_attn.o_proj.bias"]
        )


def test_one_group_stays_and_its_heads_all_move(config: ModelConfig) -> None:
    shape = replace(config, num_heads=4, num_kv_heads=1, head_dim=2)
    moved = head_permutation.permute_heads(_numbered_heads(shape), shape, np.random.default_rng(3))
    order = moved["self_attn.q_proj.bias"].reshape(4, 2)[:, 0]
    assert sorted(order) == [0, 1, 2, 3]
    assert all(order[place] != place for place in range(4))
    assert not moved["self_attn.k_proj.weight"].any()


def test_rescaling_multiplies_norms_and_divides_columns_within_bounds(
    family: StudiedFamily, config: ModelConfig
) -> None:
    block = read_block(family.base, 0)
    moved = rmsnorm_rescaling.rescale_channels(block, config, np.random.default_rng(0))
    for norm, products in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        c = moved[f"{norm}.weight"] / block[f"{norm}.weight"]
        assert 0.5 <= c.min() < 0.7 < 1.8 < c.max() <= 2.0
        for product in products:
            np.testing.assert_allclose(
                moved[f"{product}.weight"] * c, block[f"{product}.weight"], rtol=1e-6
            )
    for untouched in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "self_attn.q_proj.bias"):
        assert moved[untouched] is block[untouched]


def test_rescaled_columns_of_equal_length_give_the_closed_form(config: ModelConfig) -> None:
    width = 200_000
    shape = replace(config, hidden_size=width)
    names = ["input_layernorm", "post_attention_layernorm"]
    names += ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    block = {f"{name}.weight": np.ones((1, width), dtype=np.float32) for name in names}
    moved = rmsnorm_rescaling.rescale_channels(block, shape, np.random.default_rng(0))
    attention = distance(block, moved, ATTENTION)
    mlp = distance(block, moved, MLP)
    # 1/c for c ~ U[1/2, 2]: mean (ln 4)/1.5, mean square 1, so |1 - 1/c|² has mean 2 - 2 cos.
    cos = math.log(4) / 1.5
    symmetric = math.sqrt(2 - 2 * cos) / 2
    assert attention.cos == pytest.approx((3 * cos + 1) / 4, abs=2e-3)
    assert attention.symmetric == pytest.approx(3 * symmetric / 4, abs=2e-3)
    assert mlp.cos == pytest.approx((2 * cos + 1) / 3, abs=2e-3)


def test_projections_are_the_attention_without_its_biases_and_norms(
    family: StudiedFamily,
) -> None:
    block = read_block(family.base, 0)
    assert sorted(PROJECTIONS.names(block)) == [f"self_attn.{x}_proj.weight" for x in "koqv"]
    biases = {name: block[name] + 1 for name in block if name.endswith(".bias")}
    assert biases
    assert distance(block, block | biases, PROJECTIONS).symmetric == 0
    assert distance(block, block | biases, ATTENTION).symmetric > 0


def test_permutations_leave_nothing_of_the_cosine_and_rescaling_most(
    family: StudiedFamily,
) -> None:
    neurons = mlp_permutation.measure(family, blocks="all")
    heads = head_permutation.measure(family, blocks="all")
    channels = rmsnorm_rescaling.measure(family, blocks="all")
    for name in family.variants:
        assert fact(neurons, f"{name}, mlp: largest_abs_cos_moved") < 0.05
        attention = f"{name}, self_attn"
        # Four heads of twelve rows: a few biases of like sign keep some of it.
        assert fact(heads, f"{attention}: largest_abs_cos_moved") < 0.35
        assert (
            fact(heads, f"{attention}: mean_cos_moved") < fact(heads, f"{attention}: mean_cos") / 5
        )
    assert min(_moved(channels, "cos")) > 0.85
    # Eq. 2 of independent directions of one length is √2, the symmetric form half of it.
    assert _moved(neurons, "epsilon")[0] == pytest.approx(math.sqrt(2), abs=0.05)
    assert _moved(neurons, "symmetric")[0] == pytest.approx(math.sqrt(0.5), abs=0.025)


def test_reference_columns_are_the_planted_distance(family: StudiedFamily) -> None:
    near, moved, far, _ = records(mlp_permutation.measure(family))
    assert (near["weights"], near["max_change"]) == ("original", None)
    assert moved["weights"] == "moved"
    assert (near["variant"], near["block"], near["part"]) == ("near", 1, "mlp")
    assert near["epsilon"] == pytest.approx(0.01, rel=1e-4)
    assert near["symmetric"] == pytest.approx(0.005, rel=1e-2)
    assert far["epsilon"] == pytest.approx(0.3, rel=1e-4)


def test_the_same_seed_gives_the_same_symmetry(family: StudiedFamily) -> None:
    first, again, other = (mlp_permutation.measure(family, seed=seed) for seed in (0, 0, 1))
    assert first.rows == again.rows
    assert first.rows != other.rows


def test_equal_blocks_have_no_ratio(family: StudiedFamily) -> None:
    with StudiedFamily.open(family.base.path, {"copy": family.base.path}) as copies:
        result = rmsnorm_rescaling.measure(copies)
    assert _original(result, "symmetric") == [0.0, 0.0, 0.0]
    ratios = {name: value for name, value in result.facts.items() if name.endswith("_ratio")}
    assert len(ratios) == 3
    assert set(ratios.values()) == {None}


def test_facts_are_of_one_variant_and_part_each(family: StudiedFamily) -> None:
    result = rmsnorm_rescaling.measure(family, blocks="all")
    for (variant, part), ratios in _ratios(result).items():
        place = f"{variant}, {part}"
        assert fact(result, f"{place}: least_symmetric_ratio") == pytest.approx(min(ratios))
        for name, weights in (("mean_cos", "original"), ("mean_cos_moved", "moved")):
            cosines = [
                value
                for value, record in zip(numbers(result, "cos"), records(result), strict=True)
                if (record["variant"], record["part"], record["weights"])
                == (variant, part, weights)
            ]
            assert len(cosines) == 3
            assert fact(result, f"{place}: {name}") == pytest.approx(np.mean(cosines))
    near, far = (fact(result, f"{name}, mlp: least_symmetric_ratio") for name in ("near", "far"))
    assert near > 10 * far  # the farther a fine-tune is, the less its distance rises


@pytest.mark.shared
@pytest.mark.parametrize("measure", MEASURES)
def test_functions_of_a_trained_family_are_preserved(
    mini: StudiedFamily, measure: Callable[..., ProbeResult]
) -> None:
    assert fact(measure(mini, blocks="all"), "worst_relative_change") < ROUND_OFF


@pytest.mark.shared
def test_trained_mlps_lose_their_cosine_to_a_permutation(mini: StudiedFamily) -> None:
    result = mlp_permutation.measure(mini, blocks="all")
    assert min(_original(result, "cos")) > 0.9
    for name in mini.variants:
        assert fact(result, f"{name}, mlp: largest_abs_cos_moved") < 0.05


@pytest.mark.shared
def test_trained_heads_lose_their_cosine_at_least_fivefold(mini: StudiedFamily) -> None:
    result = head_permutation.measure(mini, blocks="all")
    drops = [
        before / abs(after)
        for before, after in zip(_original(result, "cos"), _moved(result, "cos"), strict=True)
    ]
    assert min(drops) >= 5


@pytest.mark.shared
def test_rescaling_moves_the_cosine_of_a_trained_block_little(mini: StudiedFamily) -> None:
    result = rmsnorm_rescaling.measure(mini, blocks="all")
    falls = [
        before - after
        for before, after in zip(_original(result, "cos"), _moved(result, "cos"), strict=True)
    ]
    assert max(falls) < 0.065


@pytest.mark.shared
def test_rescaling_raises_the_symmetric_form_fivefold_where_a_fine_tune_is_near(
    mini: StudiedFamily,
) -> None:
    """How near depends on the part: what is rescaled of it gets 0.195 and the rest stays."""
    ratios = _ratios(rmsnorm_rescaling.measure(mini, blocks="all"))
    fivefold = {
        (variant, part): {block for block, ratio in enumerate(ratios[variant, part]) if ratio >= 5}
        for variant, part in ratios
    }
    every: set[int] = set(range(8))
    assert fivefold == {
        ("instruct", "self_attn"): {0},
        ("instruct", "self_attn projections"): every,
        ("instruct", "mlp"): every,
        ("chat", "self_attn"): {0},
        ("chat", "self_attn projections"): every,
        ("chat", "mlp"): every,
        ("math", "self_attn"): set(),
        ("math", "self_attn projections"): {0},
        ("math", "mlp"): set(),
        ("code", "self_attn"): set(),
        ("code", "self_attn projections"): set(),
        ("code", "mlp"): set(),
    }


def _ratios(result: ProbeResult) -> dict[tuple[Value, Value], list[float]]:
    """Symmetric ε after over before, block by block, of each variant's parts."""
    values = zip(numbers(result, "symmetric"), records(result), strict=True)
    sides: dict[Value, dict[tuple[Value, Value], list[float]]] = {"original": {}, "moved": {}}
    for value, record in values:
        place = (record["variant"], record["part"])
        sides[record["weights"]].setdefault(place, []).append(value)
    return {
        place: [now / was for was, now in zip(before, sides["moved"][place], strict=True)]
        for place, before in sides["original"].items()
    }


def _original(result: ProbeResult, column: str) -> list[float]:
    return [value for value, state in _states(result, column) if state == "original"]


def _moved(result: ProbeResult, column: str) -> list[float]:
    return [value for value, state in _states(result, column) if state == "moved"]


def _states(result: ProbeResult, column: str) -> list[tuple[float, Value]]:
    states = [record["weights"] for record in records(result)]
    return list(zip(numbers(result, column), states, strict=True))
