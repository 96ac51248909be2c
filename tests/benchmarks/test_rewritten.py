from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from linker_core.weights.keys import EMBED_NAME
from tests.benchmarks.rewritten import rebuilt
from tests.benchmarks.rivals import alias, one_scale
from tests.linker_core.tuning.pairs import make_pair


def test_matrices_take_the_form_and_all_else_is_the_variants(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    whole, _ = rebuilt(pair.donor, pair.variant, alias, embedding=False)
    lent, own = (load_file(each.path / "model.safetensors") for each in (pair.donor, pair.variant))
    assert whole.keys() == own.keys()
    for name, tensor in whole.items():
        is_form = ".layers." in name and tensor.dim() == 2
        assert torch.equal(tensor, (lent if is_form else own)[name].float()), name


def test_bits_count_what_is_kept_whole(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    own = load_file(pair.variant.path / "model.safetensors")
    num_weights = sum(tensor.numel() for tensor in own.values())
    vectors = sum(8 * tensor.nbytes for tensor in own.values() if tensor.dim() == 1)
    _, bits = rebuilt(pair.donor, pair.variant, alias, embedding=True)
    assert bits == vectors / num_weights
    _, bits = rebuilt(pair.donor, pair.variant, alias, embedding=False)
    assert bits == (vectors + 8 * own[EMBED_NAME].nbytes) / num_weights
    matrices = [tensor for tensor in own.values() if tensor.dim() == 2]
    _, bits = rebuilt(pair.donor, pair.variant, one_scale(), embedding=True)
    signs = sum(tensor.numel() + 16 for tensor in matrices)
    assert bits == (vectors + signs) / num_weights
