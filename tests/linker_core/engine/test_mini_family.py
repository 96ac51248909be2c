"""A trained family: what each variant says is what transformers says, alone and mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from linker_core.config import EngineConfig
from linker_core.engine.messages import ModelLoaded, SamplingParams
from tests.linker_core.engine.driving import Driver, load_message
from tests.linker_core.engine.families import (
    reference_logits,
    reference_model,
    stored_tensors,
)

VARIANTS = ("base", "instruct", "chat", "math", "code")
ALIASED_BLOCKS: dict[str, Iterable[int]] = {
    "base": (),
    "instruct": range(8),
    "chat": range(8),
    "math": (3,),
    "code": (),
}
NUM_TOKENS = 24
TIE = 1e-3  # closer logits than this may fall either way


def in_blocks(blocks: Iterable[int]) -> Callable[[str], bool]:
    prefixes = tuple(f"model.layers.{block}." for block in blocks)
    return lambda name: name.startswith(prefixes)


def agrees(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> bool:
    """Whether `tokens` is the reference's greedy answer up to its first near-tie."""
    logits = reference_logits(model, [*prompt, *tokens])
    for position, token in enumerate(tokens, start=len(prompt) - 1):
        top = logits[position].topk(2)
        if float(top.values[0] - top.values[1]) < TIE:
            return True
        if int(top.indices[0]) != token:
            return False
    return True


@pytest.mark.shared
@pytest.mark.parametrize("sharing", [False, True], ids=["own", "shared"])
def test_family_alone_and_mixed_says_what_transformers_says(shared: Path, sharing: bool) -> None:
    folder = shared / "families" / "mini-qwen2"
    driver = Driver(EngineConfig(kv_cache_tokens=2048, max_batch_tokens=64))
    donor = stored_tensors(folder / "base")
    references, prompts = {}, {}
    for name in VARIANTS:
        aliased = in_blocks(ALIASED_BLOCKS[name] if sharing else ())
        message = load_message(
            name,
            folder / name,
            donor=None if name == "base" else "base",
            aliased=aliased,
        )
        assert isinstance(driver.load(message), ModelLoaded)
        state = stored_tensors(
            folder / name,
            donor=donor,
            aliased=aliased,
        )
        references[name] = reference_model(folder / name, stored=state)
        tokenizer = Tokenizer.from_file(str(folder / name / "tokenizer.json"))
        question = f"Here is what {name} thinks about apples and two numbers: "
        prompts[name] = tokenizer.encode(question).ids
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    ids = {name: driver.submit(name, prompts[name], params) for name in VARIANTS}
    driver.run()
    for name in VARIANTS:
        mixed = driver.tokens(ids[name])
        alone = driver.generate(name, prompts[name], params)
        assert len(mixed) == len(alone) == NUM_TOKENS
        assert agrees(references[name], prompts[name], alone)
        assert agrees(references[name], prompts[name], mixed)
