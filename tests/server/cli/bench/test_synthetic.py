from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from linker_core.errors import BadCheckpointError
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.rungs import Residual
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME
from server.cli.bench.synthetic import Kinship, words, write_family
from server.cli.bench.synthetic_delta import write_delta_once
from tests.server.cli.bench.small import SHAPE
from tests.templates import compiled_in, rendered


def _family(root: Path, kinship: Kinship, num_models: int = 2) -> list[Path]:
    return write_family(root, kinship=kinship, num_models=num_models, shape=SHAPE)


def _state(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for shard in path.glob("*.safetensors") for k, v in load_file(shard).items()}


def test_variants_with_own_heads_share_every_block_with_the_base(tmp_path: Path) -> None:
    base, *variants = map(_state, _family(tmp_path, Kinship.OWN_HEAD, 3))
    for variant in variants:
        differing = [name for name in base if not torch.equal(base[name], variant[name])]
        assert differing == [EMBED_NAME]
    assert not torch.equal(variants[0][EMBED_NAME], variants[1][EMBED_NAME])


def test_equal_variants_are_equal(tmp_path: Path) -> None:
    base, variant = map(_state, _family(tmp_path, Kinship.EQUAL))
    assert all(torch.equal(base[name], variant[name]) for name in base)


def test_near_variants_differ_in_every_weight_by_little(tmp_path: Path) -> None:
    base, variant = map(_state, _family(tmp_path, Kinship.NEAR))
    for name, weight in base.items():
        spread = weight.float().std()
        assert not torch.equal(weight, variant[name])
        assert 0 < float((weight.float() - variant[name].float()).std()) < 0.3 * float(spread)


def test_a_delta_is_of_the_rung_and_written_once(tmp_path: Path) -> None:
    base, variant = _family(tmp_path, Kinship.NEAR)
    rung = Residual(bits=2, group=128)
    target = write_delta_once(base, variant, rung)
    with DeltaFile.open(target) as delta:
        assert {str(rung) for rung in delta.plan.rungs.values()} == {"int2:128", "own"}
        identity = delta.identity
    assert write_delta_once(base, variant, rung) == target
    with DeltaFile.open(target) as delta:
        assert delta.identity == identity


def test_checkpoints_pass_validation_with_tokenizer_and_template(tmp_path: Path) -> None:
    for path in _family(tmp_path, Kinship.OWN_HEAD):
        with Checkpoint.open(path) as checkpoint:
            assert checkpoint.notes == ()
            assert checkpoint.config.vocab_size == Tokenizer.load(path).num_tokens
        said = rendered(compiled_in(path), [{"role": "user", "content": "hello"}])
        assert said == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_transformers_reads_the_same_tokens_and_never_ends_early(tmp_path: Path) -> None:
    (base,) = _family(tmp_path, Kinship.EQUAL, 1)
    text = words(12, seed=3)
    ids = Tokenizer.load(base).encode(text, add_special_tokens=True)
    assert len(ids) == 12
    assert AutoTokenizer.from_pretrained(base)(text).input_ids == ids
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=40)
    assert answer.shape == (1, 52)


def test_families_are_written_once(tmp_path: Path) -> None:
    (base,) = _family(tmp_path / "a", Kinship.EQUAL, 1)
    with Checkpoint.open(base) as checkpoint:
        first = checkpoint.identity
    assert _family(tmp_path / "a", Kinship.EQUAL, 1) == [base]
    with Checkpoint.open(base) as checkpoint:
        assert checkpoint.identity == first


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (_family(tmp_path / n, Kinship.OWN_HEAD)[1] for n in "ab")
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    shape = {**SHAPE, "hidden_size": "many"}
    with pytest.raises(BadCheckpointError):
        write_family(tmp_path, kinship=Kinship.EQUAL, num_models=1, shape=shape)
    assert list(tmp_path.iterdir()) == []
