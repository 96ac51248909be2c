"""Builds the demo's family into a folder: `python -m server.cli.demo.build FOLDER`.

A process of its own, so that the server beside it shares neither memory nor threads with the
training. It writes one JSON line per step to stdout: `{"model", "done", "total"}` in steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, TypeVar

import tokenizers
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from server.cli.demo import train
from server.cli.demo.corpus import Dialogue, conversations, instructions, read_corpus
from server.cli.demo.recipes import FAMILY, MODELS, Recipe

Item = TypeVar("Item")
_DIALOGUES: Final = {"instruct": instructions, "chat": conversations}
OnProgress = Callable[[str, int, int], None]  # model, steps done, steps of the whole family
_NUM_HELD_OUT: Final = 32  # sequences of a measurement
_EXCERPT_CHARS: Final = 1_500  # of a held-out text that is written out


class FamilyBuilder:
    """Trains the four models one after another; `base` is where the others begin."""

    def __init__(self, recipe: Recipe, on_progress: OnProgress) -> None:
        self._recipe = recipe
        self._on_progress = on_progress
        self._num_done = 0
        self._corpus = read_corpus()
        self._tokenizer = train.train_tokenizer(self._corpus, recipe.shape.vocab_size)
        self._losses: dict[str, dict[str, float]] = {}

    def build(self, folder: Path) -> None:
        """Writes a checkpoint per model, and what none was trained on, into `folder`.

        `heldout/*.jsonl` are texts for each variant in the form that calibration files have;
        `family.json` has every model's losses on some of them.
        """
        model = train.new_model(self._recipe.shape, self._tokenizer, seed=self._recipe.seed)
        prose, _ = self._divide(self._corpus.prose)
        self._run("base", train.pretrain, model, self._text_batches(prose, "base"))
        # Variants begin at the donor as it is stored, so that what moved is training, not rounding.
        model.bfloat16().float()  # type: ignore[no-untyped-call]
        self._save(model, folder, "base")
        for name in MODELS[1:]:
            self._save(self._variant(name, copy.deepcopy(model)), folder, name)
        record = {"models": list(MODELS), "held_out_loss": self._losses}
        (folder / "family.json").write_text(json.dumps(record, indent=2) + "\n")
        self._write_held_out(folder / "heldout")

    def _variant(self, name: str, model: LlamaForCausalLM) -> LlamaForCausalLM:
        if name == "code":
            sources, _ = self._divide(self._corpus.sources)
            self._run(name, train.pretrain, model, self._text_batches(sources, name))
            return model
        entries, _ = self._divide(self._corpus.entries)
        training = getattr(self._recipe, name)
        batches = train.dialogue_batches(
            self._tokenizer, _DIALOGUES[name](entries), training, seed=self._recipe.seed
        )
        self._run(name, train.posttrain, model, batches)
        return model

    def _text_batches(self, texts: Sequence[str], name: str) -> Iterator[train.Batch_BT]:
        training = getattr(self._recipe, name)
        return train.text_batches(self._tokenizer, texts, training, seed=self._recipe.seed)

    def _run(
        self,
        name: str,
        trainer: Callable[..., None],
        model: LlamaForCausalLM,
        batches: Iterator[train.Batch_BT],
    ) -> None:
        recipe = self._recipe
        total = sum(getattr(recipe, each).steps for each in MODELS)

        def on_step() -> None:
            self._num_done += 1
            self._on_progress(name, self._num_done, total)

        trainer(model, batches, getattr(recipe, name), on_step)

    def _save(self, model: LlamaForCausalLM, folder: Path, name: str) -> None:
        self._losses[name] = {
            text: round(train.held_out_loss(model, batch), 3)
            for text, batch in self._held_out().items()
        }
        stored = copy.deepcopy(model).bfloat16()
        eos = [self._tokenizer.token_to_id(t) for t in (train.TURN_END, train.END_OF_TEXT)]
        stored.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=eos, pad_token_id=eos[1]
        )
        stored.save_pretrained(folder / name)
        _save_text(self._tokenizer, folder / name, self._recipe.shape.max_position_embeddings)

    def _held_out(self) -> dict[str, train.Batch_BT]:
        """The same measurements for every model, on what none of them was trained on."""
        corpus, recipe = self._corpus, self._recipe
        texts = {"prose": corpus.prose, "code": corpus.sources}
        batches = {}
        for name, documents in texts.items():
            windows = train.text_batches(
                self._tokenizer, self._divide(documents)[1], recipe.base, seed=recipe.seed
            )
            rows = [next(windows)[0] for _ in range(_NUM_HELD_OUT // recipe.base.batch)]
            ids = torch.cat(rows)
            batches[name] = (ids, ids)
        for name, dialogues in self._held_out_dialogues().items():
            batches[name] = train.dialogue_batch(
                self._tokenizer, dialogues[:_NUM_HELD_OUT], getattr(recipe, name).length
            )
        return batches

    def _write_held_out(self, folder: Path) -> None:
        folder.mkdir()
        rows: dict[str, list[object]] = {
            name: [{"messages": [asdict(message) for message in each]} for each in dialogues]
            for name, dialogues in self._held_out_dialogues().items()
        }
        _, sources = self._divide(self._corpus.sources)
        rows["code"] = [
            {"text": source[start : start + _EXCERPT_CHARS]}
            for source in sources
            for start in range(0, len(source), _EXCERPT_CHARS)
        ]
        for name, lines in rows.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text)

    def _held_out_dialogues(self) -> dict[str, list[Dialogue]]:
        _, entries = self._divide(self._corpus.entries)
        return {name: compose(entries) for name, compose in _DIALOGUES.items()}

    def _divide(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """Divides a list into what is trained on and what is held out."""
        every = self._recipe.held_out_every
        kept = [item for i, item in enumerate(items) if i % every != 0]
        return kept, list(items[::every])


def _save_text(tokenizer: tokenizers.Tokenizer, folder: Path, max_length: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": train.TURN_END,
        "pad_token": train.END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(train.CHAT_TEMPLATE)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the family; the parent process reads the progress."""
    parser = argparse.ArgumentParser(prog="python -m server.cli.demo.build", description=__doc__)
    parser.add_argument("folder", type=Path, help="an existing, empty folder")
    folder: Path = parser.parse_args(argv).folder
    torch.set_num_threads(1)  # the workers of the training are the parallelism

    def report(model: str, done: int, total: int) -> None:
        sys.stdout.write(json.dumps({"model": model, "done": done, "total": total}) + "\n")
        sys.stdout.flush()

    FamilyBuilder(FAMILY, report).build(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
