"""The model under study against Hugging Face's own reading of the same files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant, retyped

IDS_BT = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(5))
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "base")


def _reference_logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits: torch.Tensor = model(IDS_BT).logits
    return logits


def _reference_losses(path: Path) -> torch.Tensor:
    log_probs = _reference_logits(path)[:, :-1].log_softmax(-1)
    return -log_probs.gather(2, IDS_BT[:, 1:, None]).squeeze(2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_of_every_architecture_are_those_of_transformers(
    tmp_path: Path, architecture: str
) -> None:
    path = make_checkpoint(
        tmp_path / "base", architecture=architecture, tie=architecture != "llama"
    )
    with Checkpoint.open(path) as checkpoint:
        losses = StudyModel.open(checkpoint).losses(IDS_BT)
    torch.testing.assert_close(losses, _reference_losses(path), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_stored_type_is_read_exactly(tmp_path: Path, base: Path, dtype: str) -> None:
    path = retyped(tmp_path / dtype, base, dtype)
    with Checkpoint.open(path) as stored, Checkpoint.open(base) as original:
        there, here = StudyModel.open(stored), StudyModel.open(original)
        name = Q_PROJ
        # bf16 values of this size are float16 values too.
        assert torch.equal(there.get(name), here.get(name).to(getattr(torch, dtype)).float())


def test_logits_are_those_of_transformers(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        logits = model.logits(model.hidden(IDS_BT))
    torch.testing.assert_close(logits, _reference_logits(base), rtol=1e-4, atol=1e-4)


def test_a_token_beyond_the_vocabulary_is_refused(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        last = checkpoint.config.vocab_size - 1
        assert model.losses(torch.tensor([[1, last]])).isfinite().all()
        with pytest.raises(InvalidRequestError, match=f"last token is {last}"):
            model.losses(torch.tensor([[1, last + 1]]))


def test_many_rows_have_the_losses_of_few(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        together = model.losses(IDS_BT.repeat(9, 1))  # more rows than one piece of logits has
        alone = model.losses(IDS_BT)
    torch.testing.assert_close(together, alone.repeat(9, 1), rtol=1e-5, atol=1e-5)


def test_filling_up_on_the_right_changes_no_loss(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        short = model.losses(IDS_BT[:, :20])
        filled = model.losses(torch.cat([IDS_BT[:, :20], torch.zeros(2, 9, dtype=torch.long)], 1))
    torch.testing.assert_close(filled[:, :19], short, rtol=1e-5, atol=1e-5)


def test_put_and_restore_change_outputs_and_change_them_back(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        before = model.losses(IDS_BT)
        model.put(Q_PROJ, np.zeros(model.get(Q_PROJ).shape, dtype=np.float32))
        assert not model.get(Q_PROJ).any()
        assert not torch.allclose(model.losses(IDS_BT), before)
        model.restore([Q_PROJ])
        assert torch.equal(model.losses(IDS_BT), before)


def test_a_tied_head_follows_the_embedding(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        assert "lm_head.weight" not in model.names
        model.put(EMBED, torch.zeros_like(model.get(EMBED)))
        assert not model.module.get_parameter("lm_head.weight").any()
        assert torch.allclose(model.losses(IDS_BT), torch.tensor(math.log(512)))


def test_adopting_all_tensors_of_another_checkpoint_gives_its_losses(
    tmp_path: Path, base: Path
) -> None:
    variant = make_variant(tmp_path / "variant", base, scale=0.3)
    with Checkpoint.open(base) as ours, Checkpoint.open(variant) as theirs:
        model = StudyModel.open(ours)
        model.adopt(theirs, model.names)
        losses = model.losses(IDS_BT)
    torch.testing.assert_close(losses, _reference_losses(variant), rtol=1e-4, atol=1e-4)


def test_a_tensor_of_another_shape_is_refused(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        with pytest.raises(AssertionError, match=Q_PROJ):
            model.put(Q_PROJ, torch.zeros(1))


def test_gradients_reach_weights_once_they_are_asked_for(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        assert not model.losses(IDS_BT).requires_grad
        model.module.requires_grad_()
        weight = model.module.get_parameter(Q_PROJ)
        (gradient,) = torch.autograd.grad(model.losses(IDS_BT).mean(), weight)
    assert gradient.any()


def test_greedy_answers_are_the_most_likely_tokens_one_by_one(base: Path) -> None:
    prompt = IDS_BT[0, :7].tolist()
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        answer = model.greedy(prompt, max_tokens=12, stop_ids=())
        assert len(answer) == 12
        for length in range(12):
            ids = torch.tensor([prompt + answer[:length]])
            assert int(model.logits(model.hidden(ids)[0, -1:]).argmax()) == answer[length]


def test_greedy_answers_end_before_a_stop_token_and_at_the_context_end(base: Path) -> None:
    prompt = IDS_BT[0, :7].tolist()
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint)
        answer = model.greedy(prompt, max_tokens=12, stop_ids=())
        first = answer.index(answer[5])
        assert model.greedy(prompt, max_tokens=12, stop_ids={answer[5]}) == answer[:first]
        long = IDS_BT.reshape(-1).repeat(4)[:250].tolist()
        assert len(model.greedy(long, max_tokens=20, stop_ids=())) == 256 - 250


def test_a_model_in_bfloat16_rounds_and_stays_near(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        model = StudyModel.open(checkpoint, dtype=torch.bfloat16)
        assert model.get(Q_PROJ).dtype is torch.bfloat16
        losses = model.losses(IDS_BT)
    assert losses.dtype is torch.float32
    assert abs(float(losses.mean() - _reference_losses(base).mean())) < 0.1


def test_the_tokenizer_is_the_checkpoints(base: Path) -> None:
    with Checkpoint.open(base) as checkpoint:
        tokenizer = StudyModel.open(checkpoint).tokenizer
    assert tokenizer.decode(tokenizer.encode("Good day", add_special_tokens=False)) == "Good day"
