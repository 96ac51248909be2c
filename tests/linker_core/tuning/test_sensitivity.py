"""Sensitivities against the same formulas on transformers' own hidden states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from linker_core.residency.loader import read_tensor
from linker_core.residency.stored import StoredResidual
from linker_core.sharing.rungs import Rung, parse_rung
from linker_core.tuning import block_probe, storages
from linker_core.tuning import walk as walk_module
from linker_core.tuning.sensitivity import Sensitivity, measure_sensitivities
from linker_core.tuning.storages import Rungs
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.tuning.pairs import Pair, make_pair, open_pair, random_text
from tests.tiny import ARCHITECTURES, make_checkpoint, save_state

LENGTHS = (30, 9, 17)
UP, GATE = "mlp.up_proj.weight", "mlp.gate_proj.weight"


def sensitivities(pair: Pair, lengths: tuple[int, ...] = LENGTHS) -> list[Sensitivity]:
    ids = [token for s in random_text(lengths).sequences for token in s.token_ids]
    found = measure_sensitivities(pair.walk(lengths), pair.reader(), pair.base, ids)
    assert len({(one.name, one.rung) for one in found}) == len(found)
    return found


def measured(pair: Pair, lengths: tuple[int, ...] = LENGTHS) -> dict[str, float]:
    """What an alias of each weight does."""
    found = sensitivities(pair, lengths)
    return {one.name: one.error for one in found if one.rung is Rung.ALIAS}


class Recording:
    """What goes into and out of every module of transformers' model over the text."""

    def __init__(self, pair: Pair, rungs: Rungs) -> None:
        self.model = pair.oracle(rungs)
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.outputs: dict[str, list[torch.Tensor]] = {}
        for name, module in self.model.named_modules():
            module.register_forward_hook(partial(self._note, name), with_kwargs=True)
        for sequence in random_text(LENGTHS).sequences:
            with torch.inference_mode():
                self.model(torch.tensor([sequence.token_ids]), use_cache=False)

    def _note(self, name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        made = output[0] if isinstance(output, tuple) else output
        if isinstance(given, torch.Tensor) and isinstance(made, torch.Tensor):
            self.inputs.setdefault(name, []).append(given.flatten(0, -2))
            self.outputs.setdefault(name, []).append(made.flatten(0, -2))

    def into(self, name: str) -> torch.Tensor:
        return torch.cat(self.inputs[name]).double()

    def out_of(self, name: str) -> torch.Tensor:
        return torch.cat(self.outputs[name]).double()


def relative(swapped: torch.Tensor, own: torch.Tensor) -> float:
    return float(((swapped - own).square().sum(-1) / own.square().sum(-1)).mean())


def donor_state(pair: Pair) -> dict[str, torch.Tensor]:
    return load_file(pair.donor.path / "model.safetensors")


def direct_block(
    lent: Mapping[str, torch.Tensor], recording: Recording, layer: int
) -> dict[str, float]:
    """Relative error of each weight's output times the share of the stream that is written."""
    prefix = f"model.layers.{layer}"
    gemma = f"{prefix}.pre_feedforward_layernorm.weight" in lent
    before_mlp = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
    streams = [
        recording.into(f"{prefix}.input_layernorm"),
        recording.into(f"{prefix}.{before_mlp}"),
        recording.out_of(prefix),
    ]
    share = {
        part: float(((after - before).square().sum(-1) / after.square().sum(-1)).mean())
        for part, before, after in zip(("self_attn", "mlp"), streams, streams[1:], strict=False)
    }

    def swapped(leaf: str) -> torch.Tensor:
        own = recording.model.state_dict().get(f"{prefix}.{leaf}.bias")
        out = recording.into(f"{prefix}.{leaf}") @ lent[f"{prefix}.{leaf}.weight"].double().T
        return out if own is None else out + own.double()

    errors = {
        f"{prefix}.{leaf}.weight": relative(swapped(leaf), recording.out_of(f"{prefix}.{leaf}"))
        for leaf in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            "mlp.down_proj",
        )
    }
    inner: Any = recording.model.model
    activation = inner.layers[layer].mlp.act_fn
    gate, up = (recording.out_of(f"{prefix}.mlp.{kind}_proj") for kind in ("gate", "up"))
    gated = activation(gate) * up
    errors[f"{prefix}.{GATE}"] = relative(activation(swapped("mlp.gate_proj")) * up, gated)
    errors[f"{prefix}.{UP}"] = relative(activation(gate) * swapped("mlp.up_proj"), gated)
    return {name: error * share[name.split(".")[3]] for name, error in errors.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_weights_are_charged_what_the_formula_says(tmp_path: Path, architecture: str) -> None:
    pair = make_pair(tmp_path, architecture=architecture, layers=2, scale=0.1)
    found, recording = measured(pair), Recording(pair, pair.base)
    lent = donor_state(pair)
    want = direct_block(lent, recording, 0) | direct_block(lent, recording, 1)
    assert len(want) == 14
    assert found.keys() == {*want, EMBED_NAME}
    assert {name: found[name] for name in want} == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("text", ["rank8:4", "int2:128", "signs:128"])
def test_residuals_are_charged_by_what_they_leave(tmp_path: Path, text: str) -> None:
    pair = make_pair(tmp_path, layers=2, scale=0.1)
    rung, reader = parse_rung(text), pair.reader()
    found = {one.name: one.error for one in sensitivities(pair) if one.rung == rung}
    held = donor_state(pair)
    for name in found:
        stored = reader.passing(name, rung)
        assert isinstance(stored, StoredResidual)
        held[name] = held[name].float() + stored.delta()
    recording = Recording(pair, pair.base)
    want = direct_block(held, recording, 0) | direct_block(held, recording, 1)
    assert {name: found[name] for name in want} == pytest.approx(want, rel=2e-3)
    assert 0 < found[EMBED_NAME] < measured(pair)[EMBED_NAME]


def test_errors_of_picked_rows_stand_for_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(tmp_path, layers=1, scale=0.1)
    every = {(one.name, one.rung): one.error for one in sensitivities(pair)}
    monkeypatch.setattr(block_probe, "_PICKED_OUTPUTS", 12)
    for one in sensitivities(pair):
        if one.name != EMBED_NAME:
            assert every[one.name, one.rung] / 2 < one.error < 2 * every[one.name, one.rung]


def test_measuring_in_batches_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, layers=2, scale=0.1)
    want = measured(pair)
    monkeypatch.setattr(walk_module, "_ACTIVATION_BYTES", 1)
    assert measured(pair) == pytest.approx(want, rel=1e-4)


def head_kl(pair: Pair, name: str) -> float:
    """Mean KL of the head alone being the donor's, the states before it staying the variant's."""
    recording = Recording(pair, pair.base)
    states = recording.out_of("model.norm")
    tables = [
        load_file(side.path / "model.safetensors")[name] for side in (pair.variant, pair.donor)
    ]
    own, swapped = (torch.log_softmax(states @ table.double().T, dim=-1) for table in tables)
    return float((own.exp() * (own - swapped)).sum(-1).mean())


def embedding_error(pair: Pair) -> float:
    ids = [token for s in random_text(LENGTHS).sequences for token in s.token_ids]
    own, lent = (
        load_file(side.path / "model.safetensors")[EMBED_NAME][ids].double()
        for side in (pair.variant, pair.donor)
    )
    return relative(lent, own)


def test_embedding_and_head_are_charged_apart_where_they_are_two(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=2, scale=0.1, tie=False)
    found = measured(pair)
    assert found[LM_HEAD_NAME] == pytest.approx(head_kl(pair, LM_HEAD_NAME), rel=1e-3)
    assert found[EMBED_NAME] == pytest.approx(embedding_error(pair), rel=1e-3)


def test_tied_embedding_is_charged_for_both_its_places(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=2, scale=0.1)
    found = measured(pair)
    assert LM_HEAD_NAME not in found
    want = embedding_error(pair) + head_kl(pair, EMBED_NAME)
    assert found[EMBED_NAME] == pytest.approx(want, rel=1e-3)


def test_what_cannot_or_need_not_alias_is_not_measured(tmp_path: Path) -> None:
    same = "model.layers.0.mlp.up_proj.weight"
    scale = {name: 0.1 for name in block_names() if name != same}
    pair = make_pair(tmp_path, layers=2, scale=scale, added_tokens=["<|a|>"])
    found = measured(pair)
    assert found.keys() == {name for name in scale if "proj.weight" in name}
    assert len(found) == 13


def block_names(layers: int = 2) -> list[str]:
    leaves = [f"self_attn.{letter}_proj.weight" for letter in "qkvo"]
    leaves += [f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]
    return [f"model.layers.{layer}.{leaf}" for layer in range(layers) for leaf in leaves]


def test_weight_of_equal_values_and_other_bytes_does_no_harm(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "donor")
    variant = make_checkpoint(tmp_path / "variant")
    state = load_file(donor / "model.safetensors")
    names = [*block_names(), EMBED_NAME]
    for name in names:
        state[name][7] = 0.0
    save_state(donor, state)
    for name in names:
        state[name][7] = -0.0
    save_state(variant, state)
    pair = open_pair(tmp_path)
    assert {name: pair.base[name] for name in names} == {
        **dict.fromkeys(block_names(), Rung.OWN),
        EMBED_NAME: Rung.ROWS,
    }
    assert measured(pair) == dict.fromkeys(names, 0.0)


def test_harm_grows_with_the_delta(tmp_path: Path) -> None:
    found = [
        measured(make_pair(tmp_path / str(scale), layers=2, scale=dict.fromkeys(names, scale)))
        for names in [[*block_names(), EMBED_NAME]]
        for scale in (0.02, 0.04, 0.08)
    ]
    for name in found[0]:
        small, middle, large = (errors[name] for errors in found)
        assert 2 * small < middle < large / 2, name


def test_each_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, layers=2, tie=False)
    reads: Counter[tuple[str, str]] = Counter()

    def counted(checkpoint: Checkpoint, name: str, *, device: torch.device) -> torch.Tensor:
        reads[checkpoint.path.name, name] += 1
        return read_tensor(checkpoint, name, device=device)

    monkeypatch.setattr(storages, "read_tensor", counted)
    swapped = measured(pair)
    want = [("variant", name) for name in pair.variant.tensors]
    assert reads == Counter([*want, *(("donor", name) for name in swapped)])


def test_order_of_harm_is_close_to_the_order_of_true_prices(tmp_path: Path) -> None:
    names = [*block_names(3), EMBED_NAME]
    generator = np.random.default_rng(4)
    spread = 10 ** generator.uniform(-2, -0.7, size=len(names))
    pair = make_pair(tmp_path, scale=dict(zip(names, spread.tolist(), strict=True)))
    found = measured(pair)
    prices = pair.pricer(random_text([40] * 8)).price([pair.aliasing(name) for name in names])
    correlation = spearman(
        np.array([found[name] for name in names]), np.array([price.kl for price in prices])
    )
    assert correlation > 0.8


def spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    ranks = np.array([np.argsort(np.argsort(values)) for values in (a, b)], dtype=np.float64)
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
