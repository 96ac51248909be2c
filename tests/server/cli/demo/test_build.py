from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from linker_core.sharing.report import ScanReport
from linker_core.sharing.scan import scan
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.dialogues import load_dialogues
from linker_core.weights.checkpoint import Checkpoint
from server.cli.demo import train
from server.cli.demo.build import FamilyBuilder
from server.cli.demo.corpus import Message, conversations, instructions, read_corpus
from server.cli.demo.recipes import FAMILY, MODELS, tiny, version
from server.gateway.tools.finder import CallFinder
from server.gateway.tools.pieces import CallBegun
from server.gateway.tools.wire import HERMES, wire_format
from tests.templates import compiled_in, rendered

TINY = tiny(FAMILY, steps=3)
TAU_COS, TAU_FROB = 0.999, 0.05  # the conservative tier


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    FamilyBuilder(TINY, lambda _model, _done, _total: None).build(folder)
    return folder


def compare(family: Path, name: str) -> ScanReport:
    with Checkpoint.open(family / "base") as donor, Checkpoint.open(family / name) as variant:
        return scan(donor, variant)


def test_every_model_is_a_checkpoint_that_opens(family: Path) -> None:
    for name in MODELS:
        with Checkpoint.open(family / name) as checkpoint:
            assert checkpoint.config.num_layers == TINY.shape.num_layers
            assert checkpoint.config.tie_word_embeddings
            assert checkpoint.config.dtype == "bfloat16"
            assert not [tensor for tensor in checkpoint.tensors if "bias" in tensor]
        files = {path.name for path in (family / name).iterdir()}
        assert files >= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        }


def test_text_side_is_what_transformers_reads(family: Path) -> None:
    messages = [{"role": "user", "content": "What is 12 + 30?\n"}]
    ours, theirs = (
        Tokenizer.load(family / "chat"),
        AutoTokenizer.from_pretrained(family / "chat"),
    )
    template = compiled_in(family / "chat")
    prompt = rendered(template, messages, bos=ours.bos_token, eos=ours.eos_token)
    assert prompt == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = ours.encode(prompt, add_special_tokens=False)
    assert ids == theirs.encode(prompt, add_special_tokens=False)
    assert ours.num_tokens <= TINY.shape.vocab_size


def test_template_shows_tools_and_calls_that_are_found_again(family: Path) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"function": {"name": "look", "arguments": {"word": "dedent"}}}
    messages: list[Any] = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "found"},
    ]
    theirs = AutoTokenizer.from_pretrained(family / "chat")
    text = str(theirs.apply_chat_template(messages, tools=[tool], tokenize=False))
    head, _, turns = text.partition("<|im_start|>user\n")
    assert json.dumps(tool) in head
    finder = CallFinder(HERMES, {"look"})
    assert [*finder.push(turns), *finder.finish()].count(CallBegun("look")) == 1
    assert turns.endswith("user\n<tool_response>found</tool_response><|im_end|>\n")
    assert wire_format(train.CHAT_TEMPLATE) is HERMES


def test_answers_end_at_the_end_of_a_turn_or_text(family: Path) -> None:
    tokenizer = Tokenizer.load(family / "base")
    with Checkpoint.open(family / "base") as checkpoint:
        texts = {
            tokenizer.decode([token_id], skip_special_tokens=False)
            for token_id in checkpoint.eos_token_ids
        }
    assert texts == {train.TURN_END, train.END_OF_TEXT}


def test_family_record_holds_a_loss_per_model_and_text(family: Path) -> None:
    record = json.loads((family / "family.json").read_text())
    assert record["models"] == list(MODELS)
    for losses in record["held_out_loss"].values():
        assert set(losses) == {"prose", "code", "instruct", "chat"}
        assert all(0 < loss < 20 for loss in losses.values())


def test_held_out_texts_are_a_calibration_file_for_each_variant(family: Path) -> None:
    for name in MODELS[1:]:
        dialogues = load_dialogues(family / "heldout" / f"{name}.jsonl")
        given = [dialogue for dialogue in dialogues if dialogue.given]
        assert len(given) > 100
        assert {dialogue.plain for dialogue in given} == {name == "code"}


def test_held_out_dialogues_say_nothing_that_was_trained_on(family: Path) -> None:
    entries = read_corpus().entries
    trained = [e for i, e in enumerate(entries) if i % TINY.held_out_every != 0]
    for name, compose in (("instruct", instructions), ("chat", conversations)):
        asked = {m.content for each in compose(trained) for m in each if m.role == "user"}
        rows = (family / "heldout" / f"{name}.jsonl").read_text().splitlines()
        turns = [turn for row in rows for turn in json.loads(row)["messages"]]
        held_out = {turn["content"] for turn in turns if turn["role"] == "user"}
        assert held_out
        assert not held_out & asked


def test_light_training_leaves_norms_alone_and_moves_the_embedding(family: Path) -> None:
    for name in ("instruct", "chat"):
        for block in compare(family, name).blocks:
            norms = [sums for key, sums in block.params.items() if "norm" in key]
            assert norms
            assert all(sums.identical for sums in norms)
    base, chat = (embedding(family, name) for name in ("base", "chat"))
    assert not torch.equal(base, chat)


def embedding(family: Path, name: str) -> torch.Tensor:
    with Checkpoint.open(family / name) as checkpoint:
        info = checkpoint.tensors["model.embed_tokens.weight"]
        buffer = bytearray(info.nbytes)
        checkpoint.read_into("model.embed_tokens.weight", memoryview(buffer))
    return torch.frombuffer(buffer, dtype=torch.bfloat16)


def test_progress_counts_every_step_once(tmp_path: Path) -> None:
    recipe, seen = tiny(FAMILY, steps=1), list[tuple[str, int, int]]()
    FamilyBuilder(recipe, lambda *step: seen.append(step)).build(tmp_path)
    assert seen == [(name, i, len(MODELS)) for i, name in enumerate(MODELS, start=1)]


def test_dialogue_batch_learns_answers_and_nothing_else() -> None:
    tokenizer = train.train_tokenizer(read_corpus(), 384)
    dialogue = (
        Message(role="user", content="Why?"),
        Message(role="assistant", content="Because."),
    )
    ids_BT, labels_BT = train.dialogue_batch(tokenizer, [dialogue], 100)
    learnt = ids_BT[0][labels_BT[0] >= 0].tolist()
    assert tokenizer.decode(learnt, skip_special_tokens=False) == "Because.<|im_end|>"
    assert torch.equal(ids_BT[0][labels_BT[0] >= 0], labels_BT[0][labels_BT[0] >= 0])


def test_version_follows_the_recipe() -> None:
    assert version(FAMILY) == version(FAMILY)
    assert version(FAMILY) != version(TINY)


@pytest.mark.slow
def test_real_family_has_two_variants_that_share_every_block_and_one_that_shares_none(
    tmp_path: Path,
) -> None:
    FamilyBuilder(FAMILY, lambda _model, _done, _total: None).build(tmp_path)
    for name in ("instruct", "chat"):
        for block in compare(tmp_path, name).blocks:
            assert block.cos >= 1 - (1 - TAU_COS) / 2  # half of what the tier allows
            assert block.epsilon <= TAU_FROB / 2
    for block in compare(tmp_path, "code").blocks:
        assert block.cos < TAU_COS - 0.02
        assert block.epsilon > 3 * TAU_FROB
    losses = json.loads((tmp_path / "family.json").read_text())["held_out_loss"]
    for name in ("instruct", "chat", "code"):
        assert losses[name][name] < losses["base"][name] - 0.5
