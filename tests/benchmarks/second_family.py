"""Trains a second small family for studies across architectures.

`python -m tests.benchmarks.second_family DATA FOLDER` trains a Llama with the projection shapes of
the mini-qwen2 family (8 layers, width 256, 4 heads over 2 of keys, MLP 768), its own tokenizer and
its own initialisation, on the texts under DATA (`wikitext2`, `alpaca`, `gsm8k`), and keeps `base`,
`instruct`, `context`, `math` and `code` under FOLDER. A model that is there already is kept, so a
run that was ended goes on. About half an hour on two busy cores. Nothing trained here may be
shipped: Alpaca is licensed for non-commercial use.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import tokenizers
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from server.cli.demo import train
from server.cli.demo.corpus import Corpus, Dialogue, Message, read_corpus
from server.cli.demo.recipes import Shape, Training

SEED: Final = 1
SHAPE: Final = Shape(
    hidden_size=256, intermediate_size=768, num_layers=8, num_heads=4, num_kv_heads=2,
    head_dim=64, vocab_size=4_096, max_position_embeddings=512,
)  # fmt: skip
BASE: Final = Training(steps=420, batch=4, length=512, block_rate=0.02, embedding_rate=6e-3)
CODE: Final = Training(steps=120, batch=4, length=512, block_rate=0.01, embedding_rate=2e-3)
DIALOGUES: Final = Training(steps=160, batch=8, length=256, block_rate=2e-4, embedding_rate=1e-3)
MATH: Final = replace(DIALOGUES, steps=80)

NUM_HELD_OUT_RECORDS: Final = 200  # the last of Alpaca, which the mini-qwen2 family leaves out too
NUM_TRAINED_QUESTIONS: Final = 1_100  # of GSM8K, the last; that family holds out the first 200
_PIECE_CHARS: Final = 40_000  # a text of the corpus
_NUM_PIECES_FOR_TOKENIZER: Final = 40
_NUM_MEASURED: Final = 16  # held-out sequences


class SecondFamily:
    """The texts, the tokenizer and the models, one after another."""

    def __init__(self, data: Path, folder: Path) -> None:
        self._folder = folder
        wiki = (data / "wikitext2/train.txt").read_text(encoding="utf-8")
        self._prose = [wiki[i : i + _PIECE_CHARS] for i in range(0, len(wiki), _PIECE_CHARS)]
        self._valid = (data / "wikitext2/valid.txt").read_text(encoding="utf-8")
        self._sources = read_corpus().sources
        records = json.loads((data / "alpaca/alpaca_5000.json").read_text(encoding="utf-8"))
        questions = (data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
        self._records = records
        self._questions = [json.loads(line) for line in questions]
        self._tokenizer = self._trained_tokenizer()

    def build(self) -> None:
        """Trains what is not there yet; every variant begins at the base as it is stored."""
        if not self._has("base"):
            model = train.new_model(SHAPE, self._tokenizer, seed=SEED)
            self._run("base", train.pretrain, model, self._text(self._prose, BASE), BASE)
        base = LlamaForCausalLM.from_pretrained(self._folder / "base", dtype=torch.float32)
        if not self._has("code"):
            batches = self._text(self._sources, CODE)
            self._run("code", train.pretrain, copy.deepcopy(base), batches, CODE)
        for name, dialogues in self._dialogues().items():
            if not self._has(name):
                training = MATH if name == "math" else DIALOGUES
                batches = train.dialogue_batches(self._tokenizer, dialogues, training, seed=SEED)
                self._run(name, train.posttrain, copy.deepcopy(base), batches, training)

    def _trained_tokenizer(self) -> tokenizers.Tokenizer:
        kept = self._folder / "base/tokenizer.json"
        if kept.is_file():
            return tokenizers.Tokenizer.from_file(str(kept))
        texts = [*self._prose[:_NUM_PIECES_FOR_TOKENIZER], *(t["output"] for t in self._trained())]
        corpus = Corpus(prose=tuple(texts), sources=self._sources, entries=())
        return train.train_tokenizer(corpus, SHAPE.vocab_size)

    def _trained(self) -> list[dict[str, str]]:
        trained: list[dict[str, str]] = self._records[:-NUM_HELD_OUT_RECORDS]
        return trained

    def _dialogues(self) -> dict[str, list[Dialogue]]:
        """Returns three fine-tunes' dialogues; no record is in two of them."""
        records = self._trained()
        return {
            "instruct": [_instruction(r) for r in records if not r["input"]],
            "context": [_instruction(r) for r in records if r["input"]],
            "math": [
                _dialogue(q["question"], q["answer"])
                for q in self._questions[-NUM_TRAINED_QUESTIONS:]
            ],
        }

    def _text(self, texts: Sequence[str], training: Training) -> Iterator[train.Batch_BT]:
        return train.text_batches(self._tokenizer, texts, training, seed=SEED)

    def _has(self, name: str) -> bool:
        return (self._folder / name / "config.json").is_file()

    def _run(
        self,
        name: str,
        trainer: Callable[..., None],
        model: LlamaForCausalLM,
        batches: Iterator[train.Batch_BT],
        training: Training,
    ) -> None:
        began, done = time.monotonic(), 0

        def on_step() -> None:
            nonlocal done
            done += 1
            if done % 20 == 0 or done == training.steps:
                seconds = time.monotonic() - began
                _say(f"{name}: {done} of {training.steps} steps, {seconds:.0f} s")

        trainer(model, batches, training, on_step)
        self._save(model, name)
        for text, batch in self._held_out().items():
            _say(f"{name}: loss on held-out {text} {train.held_out_loss(model, batch):.3f} nats")

    def _save(self, model: LlamaForCausalLM, name: str) -> None:
        stored = copy.deepcopy(model).bfloat16()
        eos = [self._tokenizer.token_to_id(t) for t in (train.TURN_END, train.END_OF_TEXT)]
        stored.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=eos, pad_token_id=eos[1]
        )
        partial = self._folder / f"{name}.partial"
        stored.save_pretrained(partial)
        self._tokenizer.save(str(partial / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": train.TURN_END,
            "pad_token": train.END_OF_TEXT,
            "model_max_length": SHAPE.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        (partial / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (partial / "chat_template.jinja").write_text(train.CHAT_TEMPLATE)
        shutil.rmtree(self._folder / name, ignore_errors=True)
        partial.rename(self._folder / name)

    def _held_out(self) -> dict[str, train.Batch_BT]:
        windows = self._text([self._valid], BASE)
        ids_BT = torch.cat([next(windows)[0] for _ in range(_NUM_MEASURED // BASE.batch)])
        records = self._records[-_NUM_MEASURED:]
        answers = [_instruction(record) for record in records]
        return {
            "prose": (ids_BT, ids_BT),
            "answers": train.dialogue_batch(self._tokenizer, answers, DIALOGUES.length),
        }


def _instruction(record: dict[str, str]) -> Dialogue:
    asked = "\n\n".join(part for part in (record["instruction"], record["input"]) if part)
    return _dialogue(asked, record["output"])


def _dialogue(asked: str, answer: str) -> Dialogue:
    return (Message(role="user", content=asked), Message(role="assistant", content=answer))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the family; says where it is after every twenty steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with wikitext2, alpaca and gsm8k")
    parser.add_argument("folder", type=Path, help="where the family is kept")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the workers of the training are the parallelism
    SecondFamily(arguments.data, folder).build()
    return 0


if __name__ == "__main__":
    sys.exit(main())
