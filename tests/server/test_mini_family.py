"""Five models trained on real text through the whole server, against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linker_core import load_linked
from tests.server.live import LiveServer, live_server

pytestmark = pytest.mark.shared

VARIANTS = ("instruct", "chat", "math", "code")
MODELS = ("base", *VARIANTS)
TAU_COS, TAU_FROB = 0.99, 0.06
NUM_TOKENS = 24
TIE = 1e-3  # logits closer than this may go either way


@pytest.fixture(scope="module")
def family(shared: Path) -> Path:
    return shared / "families" / "mini-qwen2"


@pytest.fixture(scope="module")
def prompts(family: Path) -> list[str]:
    """The first user turns of two held-out sets, of different lengths."""
    texts = []
    for name in ("instruct", "math"):
        lines = (family / "heldout" / f"{name}.jsonl").read_text().splitlines()[:2]
        texts += [json.loads(line)["messages"][0]["content"] for line in lines]
    return texts


@pytest.fixture(scope="module")
def references(family: Path) -> dict[str, PreTrainedModel]:
    """Every model unlinked, in float32."""
    return {name: load(family / name) for name in MODELS}


@pytest.fixture(scope="module")
def exact(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    yield from serve(family, tmp_path_factory.mktemp("exact"), {"policy": "exact"})


@pytest.fixture(scope="module")
def linked(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    yield from serve(
        family, tmp_path_factory.mktemp("linked"), {"tau_cos": TAU_COS, "tau_frob": TAU_FROB}
    )


def serve(family: Path, state: Path, sharing: Mapping[str, Any]) -> Iterator[LiveServer]:
    with live_server(state, root=family, engine_command=None) as live:
        live.until(lambda: live.client.get("/health").is_success)
        live.onboard("base", family / "base").raise_for_status()
        for name in VARIANTS:
            live.onboard(name, family / name, donor="base", **sharing).raise_for_status()
        yield live


def load(path: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


def context_ids(folder: Path, prompt: str) -> list[int]:
    """The prompt in the family's chat format, as transformers tokenises it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return list(encoded["input_ids"])


def ask(live: LiveServer, model: str, ids: list[int]) -> list[int]:
    """Returns the greedy continuation's token ids."""
    answer = live.complete(model, ids, max_tokens=NUM_TOKENS, temperature=0, return_token_ids=True)
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def assert_greedy(model: PreTrainedModel, context: list[int], ids: list[int]) -> None:
    """Asserts that `ids` are the model's greedy continuation, up to the first near tie."""
    with torch.no_grad():
        logits = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
    compared = 0
    for row, token in zip(logits, ids, strict=True):
        first, second = torch.topk(row, 2).values.tolist()
        if first - second < TIE:
            break
        assert int(row.argmax()) == token
        compared += 1
    assert compared > 0


Answer = tuple[str, list[int], list[int]]  # model, context, continuation


def answers(live: LiveServer, family: Path, prompts: list[str], *, mixed: bool) -> list[Answer]:
    """Every model's answer to every prompt, one after another or all at once."""
    asked = [(name, context_ids(family / name, prompt)) for prompt in prompts for name in MODELS]
    with ThreadPoolExecutor(len(asked) if mixed else 1) as pool:
        found = pool.map(lambda pair: ask(live, *pair), asked)
        return [(*pair, ids) for pair, ids in zip(asked, found, strict=True)]


@pytest.mark.parametrize("mixed", [False, True])
def test_exact_answers_are_transformers_own(
    exact: LiveServer,
    family: Path,
    prompts: list[str],
    references: dict[str, PreTrainedModel],
    mixed: bool,
) -> None:
    for name, context, ids in answers(exact, family, prompts, mixed=mixed):
        assert_greedy(references[name], context, ids)


@pytest.mark.parametrize("mixed", [False, True])
def test_linked_answers_are_those_of_load_linked(
    linked: LiveServer,
    family: Path,
    prompts: list[str],
    references: dict[str, PreTrainedModel],
    mixed: bool,
) -> None:
    donor = references["base"]
    models = {
        name: load_linked(family / name, donor, tau_cos=TAU_COS, tau_frob=TAU_FROB)
        for name in VARIANTS
    }
    models["base"] = donor
    for name, context, ids in answers(linked, family, prompts, mixed=mixed):
        assert_greedy(models[name], context, ids)


def test_load_linked_is_the_variant_with_the_donors_aliased_blocks(
    linked: LiveServer, family: Path, references: dict[str, PreTrainedModel]
) -> None:
    donor_state = references["base"].state_dict()
    for name in VARIANTS:
        model = load_linked(family / name, references["base"], tau_cos=TAU_COS, tau_frob=TAU_FROB)
        reference = load(family / name)
        aliased = {
            key: donor_state[key]
            for key, parameter in model.named_parameters()
            if parameter.data_ptr() == donor_state[key].data_ptr()
        }
        blocks = {key.split(".")[2] for key in aliased}
        assert len(blocks) == linked.client.get(f"/models/{name}").json()["blocks"]["alias"]
        reference.load_state_dict(aliased, strict=False)
        ids = torch.arange(40, 140)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, reference(ids).logits)


def test_blocks_shared_are_those_known_of_the_family(linked: LiveServer) -> None:
    shared = {
        name: linked.client.get(f"/models/{name}").json()["blocks"]["alias"] for name in VARIANTS
    }
    assert shared == {"instruct": 8, "chat": 8, "math": 1, "code": 0}


@pytest.mark.parametrize("name", VARIANTS)
def test_chat_prompt_is_the_one_transformers_makes(
    linked: LiveServer, family: Path, prompts: list[str], name: str
) -> None:
    for prompt in prompts:
        answer = linked.chat(name, prompt, max_tokens=1, return_token_ids=True).json()
        assert answer["prompt_token_ids"] == context_ids(family / name, prompt)
