"""Decode speed on a CUDA device: `python -m tests.benchmarks.gpu_decode`, beside transformers.

A model of Qwen2.5-7B's shape with random weights and a vocabulary of 32,000, made on the device;
eight variants alias all of its blocks and have embeddings, norms before the head and heads of their
own. Needs about 40 GB. Prints the median of some runs; asserts nothing.

Legend: T rows of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from linker_core.engine.arithmetic import Arithmetic
from linker_core.engine.cuda.arithmetic import CudaArithmetic
from linker_core.engine.cuda.triton_kernels import TritonKernels
from linker_core.engine.devices import arithmetic_for
from linker_core.engine.kv_cache import KVCache, KVShape
from linker_core.engine.page_table import PageTable
from linker_core.engine.runner import Chunk, Runner
from linker_core.residency.stored import StoredTensor
from linker_core.weights.architecture import ModelConfig, parse_config
from linker_core.weights.shapes import expected_tensors

_CUDA = torch.device("cuda")
_NUM_VARIANTS, _PAGE_TOKENS = 8, 16
_MAX_ROWS = 32
Tensors = dict[str, StoredTensor]


def main() -> None:
    """Measures every batch, launched and replayed, then transformers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    shape = transformers_shape(args.layers)
    config = parse_config({**shape.to_dict(), "architectures": ["Qwen2ForCausalLM"]})
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, tokens/s of decoding")
    donor = random_tensors(config)
    variants = [donor, *(variant_of(donor) for _ in range(_NUM_VARIANTS - 1))]
    works = [(rows, [0] * rows) for rows in (1, 8, 32)]
    works += [(rows, [row * _NUM_VARIANTS // rows for row in range(rows)]) for rows in (8, 32)]
    for name, arithmetic in (("graphs", arithmetic_for(_CUDA)), ("launched", launched())):
        bench = Decoder(config, arithmetic, variants, args.prompt_tokens + args.new_tokens)
        for rows, slots in works:
            rates = [
                bench.rate(slots, args.prompt_tokens, args.new_tokens) for _ in range(args.runs)
            ]
            print_rate(name, rows, len(set(slots)), rates)
        del bench
    allocated = torch.cuda.memory_allocated() / 2**30
    print(f"weights of {_NUM_VARIANTS} variants: {allocated:.1f} GiB")
    del variants, donor, arithmetic
    for rows, rates in plain_rates(shape, args):
        print_rate("transformers", rows, 1, rates)


def print_rate(name: str, rows: int, num_variants: int, rates: Sequence[float]) -> None:
    """Prints a line of the table."""
    print(f"{name:>12} {rows:>3} rows {num_variants} variants {statistics.median(rates):>9.1f}")


def transformers_shape(num_layers: int) -> Qwen2Config:
    """Returns Qwen2.5-7B's shape with a vocabulary of 32,000."""
    return Qwen2Config(
        vocab_size=32_000,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=num_layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def random_tensors(config: ModelConfig) -> Tensors:
    """Returns weights with standard deviation 1/sqrt(fan in), on the device."""
    return {name: random_tensor(shape) for name, shape in expected_tensors(config).items()}


def random_tensor(shape: Sequence[int]) -> StoredTensor:
    """Returns normal numbers; a vector's are around one."""
    drawn = torch.randn(*shape, dtype=torch.bfloat16, device=_CUDA)
    return StoredTensor(tensor=drawn.mul_(shape[-1] ** -0.5).add_(1.0 if len(shape) == 1 else 0.0))


def variant_of(donor: Tensors) -> Tensors:
    """Returns a model that aliases the donor's blocks."""
    return {
        name: stored if ".layers." in name else random_tensor(stored.tensor.shape)
        for name, stored in donor.items()
    }


def launched() -> CudaArithmetic:
    """Returns the device's arithmetic without graphs."""
    processors = torch.cuda.get_device_properties(_CUDA).multi_processor_count
    return CudaArithmetic(TritonKernels(num_processors=processors), None)


class Decoder:
    """A family whose variants decode greedily.

    Args:
        config: The family's shape.
        arithmetic: Computes its blocks.
        variants: The tensors of each, in the order of the slots.
        max_tokens: Of a sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        arithmetic: Arithmetic,
        variants: Sequence[Tensors],
        max_tokens: int,
    ) -> None:
        shape = KVShape(
            num_pages=_MAX_ROWS * -(-max_tokens // _PAGE_TOKENS),
            page_tokens=_PAGE_TOKENS,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.bfloat16,
        )
        self._cache = KVCache(shape, device=_CUDA)
        self._runner = Runner(config, self._cache, arithmetic, device=_CUDA)
        for slot, tensors in enumerate(variants):
            self._runner.bind(slot, tensors)

    def rate(self, slots: Sequence[int], num_prompt: int, num_new: int) -> float:
        """Returns the tokens a second of one sequence per slot, prompts apart."""
        tables = [PageTable() for _ in slots]
        prompt = list(range(100, 100 + num_prompt))
        tokens = [
            self._step([slot], [table], [prompt], 0)[0]
            for slot, table in zip(slots, tables, strict=True)
        ]
        started = time.perf_counter()
        for done in range(num_prompt, num_prompt + num_new):
            tokens = self._step(slots, tables, [[token] for token in tokens], done)
        seconds = time.perf_counter() - started
        for table in tables:
            self._cache.release(table)
        return len(slots) * num_new / seconds

    def _step(
        self,
        slots: Sequence[int],
        tables: Sequence[PageTable],
        tokens: Sequence[Sequence[int]],
        start: int,
    ) -> list[int]:
        chunks = []
        for slot, table, ids in zip(slots, tables, tokens, strict=True):
            assert self._cache.grow(table, start + len(ids))
            chunks.append(Chunk(slot=slot, token_ids=ids, start=start, table=table, num_logits=1))
        logits_TV = self._runner.forward(chunks).logits_RV
        chosen: list[int] = logits_TV.argmax(dim=-1).tolist()
        return chosen


def plain_rates(shape: Qwen2Config, args: argparse.Namespace) -> Iterator[tuple[int, list[float]]]:
    """Yields rows and rates of transformers' own greedy generation."""
    torch.cuda.empty_cache()
    with torch.device(_CUDA):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            shape, dtype=torch.bfloat16
        ).eval()
    prompt = torch.arange(100, 100 + args.prompt_tokens, device=_CUDA)
    for rows in (1, 8, _MAX_ROWS):
        ids = prompt.repeat(rows, 1)

        def generate(num_tokens: int, ids: torch.Tensor = ids) -> None:
            lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
            settings = GenerationConfig(  # type: ignore[no-untyped-call]
                **lengths, do_sample=False, pad_token_id=0
            )
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)

        generate(2)
        rates = []
        for _ in range(args.runs):
            further = seconds_of(lambda: generate(args.new_tokens)) - seconds_of(
                lambda: generate(1)
            )
            rates.append(rows * (args.new_tokens - 1) / further)
        yield rows, rates


def seconds_of(work: Callable[[], None]) -> float:
    """Returns how long some work takes on the device."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
