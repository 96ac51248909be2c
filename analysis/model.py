"""A model to be studied: Hugging Face's module over the weights of a checkpoint, free to change.

Legend: B sequences, T tokens of each, H hidden width, V vocabulary, n rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Final, Self

import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from linker_core.errors import InvalidRequestError
from linker_core.residency.loader import read_tensor
from linker_core.residency.skeleton import build_skeleton
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME

_HEAD_ROWS: Final = 256  # logits of a whole window over a large vocabulary take gigabytes
_CPU: Final = torch.device("cpu")


def usable_device(name: str) -> torch.device:
    """Returns the device of a name that a user gave.

    Raises:
        InvalidRequestError: This machine has none of that name, or nothing is computed there.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says both of devices it lacks
        raise _unusable(name) from error
    if device.type not in ("cpu", "cuda"):  # `meta` is a device, and holds no values
        raise _unusable(name)
    return device


class StudyModel:
    """One model in memory. Not for several threads.

    Nothing requires gradients until the caller says so (`module.requires_grad_()`); what is
    computed then carries them.

    Attributes:
        checkpoint: Whose weights these were; the caller keeps it open while `restore` is used.
        module: The model, in eval mode. A tied head is the embedding's own parameter.
    """

    def __init__(self, checkpoint: Checkpoint, module: PreTrainedModel) -> None:
        self.checkpoint = checkpoint
        self.module = module

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Reads a checkpoint's weights into a new model, a tensor at a time.

        Args:
            checkpoint: Open.
            device: Where weights and arithmetic are.
            dtype: Of the weights in memory; float32 holds every stored type exactly.

        Raises:
            BadCheckpointError: A file changed.
            InsufficientCapacityError: A tensor does not fit into memory.
        """
        device = torch.device(device)
        module = study_skeleton(checkpoint.config, device=device, dtype=dtype)
        for name in checkpoint.tensors:
            values = read_tensor(checkpoint, name, device=_CPU).to(device, dtype)
            _attach(module, name, torch.nn.Parameter(values, requires_grad=False))
        if checkpoint.config.tie_word_embeddings:
            _attach(module, LM_HEAD_NAME, module.get_parameter(EMBED_NAME))
        return cls(checkpoint, module)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors, in the order of a forward pass; a tied head is not one."""
        return tuple(self.checkpoint.tensors)

    @property
    def config(self) -> ModelConfig:
        """Shape and arithmetic."""
        return self.checkpoint.config

    @property
    def device(self) -> torch.device:
        """Where weights and arithmetic are."""
        return self.get(EMBED_NAME).device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own.

        Raises:
            BadCheckpointError: It has none, or a damaged one.
        """
        return Tokenizer.load(self.checkpoint.path)

    def get(self, name: str) -> torch.Tensor:
        """Returns a tensor's present values: the memory itself, so `put` shows in it."""
        return self.module.get_parameter(name).detach()

    def put(self, name: str, values: torch.Tensor | npt.NDArray[Any]) -> None:
        """Copies values over a tensor's own, rounded to the model's type; ties stay.

        Args:
            name: One of `names`.
            values: Of the tensor's shape.
        """
        target = self.get(name)
        given = torch.as_tensor(values)
        assert given.shape == target.shape, f"{name}: {given.shape} into {target.shape}"
        target.copy_(given)

    def adopt(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        """Copies tensors of another checkpoint of the family over this model's.

        Raises:
            BadCheckpointError: A file changed.
        """
        for name in names:
            self.put(name, read_tensor(checkpoint, name, device=_CPU))

    def restore(self, names: Iterable[str] | None = None) -> None:
        """Gives tensors, or all of them, the checkpoint's values back.

        Raises:
            BadCheckpointError: A file changed.
        """
        self.adopt(self.checkpoint, self.names if names is None else names)

    def hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Returns the final norm's output, [B, T, H].

        Raises:
            InvalidRequestError: A token that the model has no row for.
        """
        if int(ids_BT.max()) >= self.config.vocab_size:
            raise InvalidRequestError(
                f"{self.checkpoint.path}: its last token is {self.config.vocab_size - 1}, and the "
                f"text in its family's tokens holds {int(ids_BT.max())}. Leave this model out, or "
                "study it with a base of its own vocabulary."
            )
        body = self.module.get_submodule("model")
        output: torch.Tensor = body(ids_BT.to(self.device), use_cache=False).last_hidden_state
        return output

    def logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits [n, V] of rows of `hidden`, soft cap included."""
        logits_nV: torch.Tensor = self.module.get_submodule("lm_head")(hidden_nH).float()
        cap = self.config.final_logit_softcapping
        return logits_nV if cap is None else cap * torch.tanh(logits_nV / cap)

    def losses(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Returns -ln p(token t | tokens before it) in nats for t = 1 … T-1, float32 [B, T-1].

        Attention is causal, so what a shorter sequence is filled up with on the right changes
        nothing before it. Only a few rows of logits exist at a time, unless gradients keep them.
        """
        batch, length = ids_BT.shape
        rows_nH = self.hidden(ids_BT)[:, :-1].reshape(batch * (length - 1), -1)
        targets_n = ids_BT[:, 1:].reshape(-1).to(self.device)
        parts = [
            functional.cross_entropy(self.logits(rows), targets, reduction="none")
            for rows, targets in zip(
                torch.split(rows_nH, _HEAD_ROWS), torch.split(targets_n, _HEAD_ROWS), strict=True
            )
        ]
        return torch.cat(parts).view(batch, length - 1)

    @torch.no_grad()
    def greedy(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop_ids: Iterable[int] | None = None
    ) -> list[int]:
        """Returns the most likely continuation, token by token.

        Args:
            prompt_ids: At least one token.
            max_tokens: No more are written, nor more than the context holds.
            stop_ids: Tokens that end it and are not part of it; the checkpoint's by default.
        """
        stops = frozenset(self.checkpoint.eos_token_ids if stop_ids is None else stop_ids)
        limit = min(max_tokens, self.config.max_position_embeddings - len(prompt_ids))
        cache = DynamicCache(config=self.module.config)
        answer: list[int] = []
        step = torch.tensor([list(prompt_ids)], device=self.device)
        while len(answer) < limit:
            output = self.module(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = int(output.logits[0, -1].argmax())
            if token in stops:
                break
            answer.append(token)
            step = torch.tensor([[token]], device=self.device)
        return answer


def study_skeleton(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Returns a family's module without its weights, every soft cap of it in force.

    Args:
        config: Shape and arithmetic.
        device: See `build_skeleton`.
        dtype: Of the parameters to come.
    """
    module = build_skeleton(config, device=device, dtype=dtype)
    if config.attn_logit_softcapping is not None:
        module.set_attn_implementation("eager")  # PyTorch's own attention knows no soft cap
    return module


def _unusable(device: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"--device {device!r:.40} cannot be used here. Take cpu, or a CUDA device of this machine.",
        param="device",
    )


def _attach(module: PreTrainedModel, name: str, parameter: torch.nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(path), attribute, parameter)
