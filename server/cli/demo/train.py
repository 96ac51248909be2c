"""Trains the demo's models. Knows no files but the tokenizer's text and no server.

Shape suffixes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from server.cli.demo.corpus import Corpus, Dialogue
from server.cli.demo.recipes import Shape, Training

# Workers take parts of a batch, each on one thread. Two threads inside every product would be
# no faster, and ten times slower as soon as another program wants one of the two cores.
NUM_WORKERS: Final = 2
END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
# ChatML, with tools and calls as Hermes has them. No dialogue here has any: they are for trying the
# interface, where a grammar writes the calls.
CHAT_TEMPLATE: Final = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}
To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- set role = 'user' if message['role'] == 'tool' else message['role'] %}<|im_start|>{{ role }}
{% if message['role'] == 'tool' %}<tool_response>{{ message['content'] }}</tool_response>
{%- else %}{{ message['content'] or '' }}{% endif %}
{%- for call in message['tool_calls'] or [] %}
<tool_call>
{{ call['function'] | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_IGNORED: Final = -100  # a label that costs nothing
_NUM_SOURCES_FOR_TOKENIZER: Final = 30
_BETAS: Final = (0.9, 0.95)
_FLOOR: Final = 0.02  # share of the rate at the first and the last step

Batch_BT = tuple[torch.Tensor, torch.Tensor]  # token ids, labels
OnStep = Callable[[], None]


def train_tokenizer(corpus: Corpus, vocab_size: int) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer of prose and some source code."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*corpus.prose, *corpus.sources[:_NUM_SOURCES_FOR_TOKENIZER]]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_model(shape: Shape, tokenizer: tokenizers.Tokenizer, *, seed: int) -> LlamaForCausalLM:
    """Returns an untrained model in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    return LlamaForCausalLM(config)


def text_batches(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], training: Training, *, seed: int
) -> Iterator[Batch_BT]:
    """Yields random windows of the running text, for as long as they are asked for."""
    stream = text_stream(tokenizer, texts)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(
            0, len(stream) - training.length, (training.batch,), generator=generator
        )
        ids_BT = torch.stack([stream[start : start + training.length] for start in starts])
        yield ids_BT, ids_BT


def text_stream(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Returns all texts as one row of token ids, each closed by the end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch(list(texts))
    return torch.tensor([i for encoding in encodings for i in (*encoding.ids, end)])


def dialogue_batches(
    tokenizer: tokenizers.Tokenizer,
    dialogues: Sequence[Dialogue],
    training: Training,
    *,
    seed: int,
) -> Iterator[Batch_BT]:
    """Yields random dialogues, padded to the longest of a batch; only answers are learnt."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(0, len(dialogues), (training.batch,), generator=generator)
        yield dialogue_batch(tokenizer, [dialogues[i] for i in chosen], training.length)


def dialogue_batch(
    tokenizer: tokenizers.Tokenizer, dialogues: Sequence[Dialogue], length: int
) -> Batch_BT:
    """Returns dialogues in the chat format, cut at `length` tokens."""
    rows = [_dialogue_row(tokenizer, dialogue, length) for dialogue in dialogues]
    longest = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)  # padding comes last, so any id does
    labels_BT = torch.full((len(rows), longest), _IGNORED)
    for row, (ids, labels) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, : len(ids)] = torch.tensor(labels)
    return ids_BT, labels_BT


def _dialogue_row(
    tokenizer: tokenizers.Tokenizer, dialogue: Dialogue, length: int
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for message in dialogue:
        head = tokenizer.encode(f"{TURN_START}{message.role}\n").ids
        body = tokenizer.encode(f"{message.content}{TURN_END}").ids
        tail = tokenizer.encode("\n").ids
        learnt = body if message.role == "assistant" else [_IGNORED] * len(body)
        ids += [*head, *body, *tail]
        labels += [*[_IGNORED] * len(head), *learnt, *[_IGNORED] * len(tail)]
    return ids[:length], labels[:length]


def pretrain(
    model: LlamaForCausalLM, batches: Iterator[Batch_BT], training: Training, on_step: OnStep
) -> None:
    """Trains every weight at a high rate: matrices of the blocks by Muon, the rest by AdamW."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        # One Muon per worker: a step of it costs as much as half a backward pass.
        torch.optim.Muon(matrices[worker::NUM_WORKERS], lr=training.block_rate, weight_decay=0.0)
        for worker in range(NUM_WORKERS)
    ]
    _train(
        model,
        batches,
        training,
        [
            *optimizers,
            torch.optim.AdamW(
                rest, lr=training.embedding_rate, betas=_BETAS, weight_decay=0.0, fused=True
            ),
        ],
        on_step,
    )


def posttrain(
    model: LlamaForCausalLM, batches: Iterator[Batch_BT], training: Training, on_step: OnStep
) -> None:
    """Trains lightly by AdamW: matrices of the blocks at their low rate, no norms."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 2)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    groups = [
        {"params": matrices, "lr": training.block_rate},
        {"params": [model.model.embed_tokens.weight], "lr": training.embedding_rate},
    ]
    optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, fused=True)
    _train(model, batches, training, [optimizer], on_step)


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[Batch_BT],
    training: Training,
    optimizers: Sequence[torch.optim.Optimizer],
    on_step: OnStep,
) -> None:
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, training.steps))
        for optimizer in optimizers
    ]
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ThreadPoolExecutor(NUM_WORKERS) as workers:
        for _ in range(training.steps):
            ids_BT, labels_BT = next(batches)
            parts = list(zip(ids_BT.chunk(NUM_WORKERS), labels_BT.chunk(NUM_WORKERS), strict=True))
            gradients = list(workers.map(lambda part: _gradients(model, learnt, part), parts))
            for parameter, *shares in zip(learnt, *gradients, strict=True):
                parameter.grad = torch.stack(shares).mean(0)
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            list(workers.map(lambda optimizer: optimizer.step(), optimizers))
            for schedule in schedules:
                schedule.step()
            on_step()


def _gradients(
    model: LlamaForCausalLM, learnt: Sequence[torch.nn.Parameter], part: Batch_BT
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of a part of a batch, leaving the model as it is."""
    ids_BT, labels_BT = part
    loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
    return torch.autograd.grad(loss, learnt)


def _share(step: int, num_steps: int) -> float:
    """A short rise, a plateau, and a fall over the second half."""
    rise = min(1.0, (step + 1) / max(1.0, num_steps / 20))
    fall = min(1.0, 2 * (num_steps - step) / num_steps)
    return max(_FLOOR, rise * fall)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, batch: Batch_BT) -> float:
    """Returns the mean cross-entropy in nats per learnt token."""
    ids_BT, labels_BT = batch
    loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
    return float(loss)
