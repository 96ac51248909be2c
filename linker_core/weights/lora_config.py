"""adapter_config.json of a LoRA adapter: what is served of it, and each module's rank and scaling.

The scaling is alpha / r (Hu et al. 2021), or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

from linker_core.errors import UnsupportedFormatError
from linker_core.weights.fields import Fields

ADAPTER_CONFIG: Final = "adapter_config.json"
MAX_RANK = 4096
_MAX_ALPHA = 1e6
_MAX_PATTERNS = 1 << 14
# PEFT takes these keys as regular expressions; names are all that a pattern needs.
_PATTERN = re.compile(r"\^?[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
# What is read here, does not bear on the weights, or shows in the tensors themselves.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # those that leave the base as it is

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What a module's scaling depends on. A pattern's first key that fits a module counts."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]  # by the end of a module's name, or "^" and the whole of it
    alphas: Mapping[str, float]

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> Self:
        """Reads an adapter_config.json that has been parsed as JSON.

        Raises:
            UnsupportedFormatError: Another kind of adapter, or a setting that is not served.
            BadCheckpointError: A value of another type or out of bounds.
        """
        fields = Fields(record, ADAPTER_CONFIG)
        _refuse_unserved(fields)
        ranks, alphas = (_pattern(fields, key) for key in ("rank_pattern", "alpha_pattern"))
        return cls(
            rank=fields.integer("r", low=1, high=MAX_RANK, default=8),
            alpha=fields.number("lora_alpha", low=-_MAX_ALPHA, high=_MAX_ALPHA, default=8),
            rslora=fields.boolean("use_rslora", default=False),
            ranks={key: ranks.integer(key, low=1, high=MAX_RANK) for key in ranks.record},
            alphas={
                key: alphas.number(key, low=-_MAX_ALPHA, high=_MAX_ALPHA) for key in alphas.record
            },
        )

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's factors."""
        return _first(self.ranks, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Returns what B A is multiplied by."""
        alpha, rank = _first(self.alphas, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _refuse_unserved(fields: Fields) -> None:
    record = fields.record
    if record.get("peft_type") != "LORA":
        raise _unserved("peft_type", record.get("peft_type"), "LORA")
    if record.get("task_type") not in (None, "CAUSAL_LM"):
        raise _unserved("task_type", record.get("task_type"), "CAUSAL_LM")
    if record.get("bias") not in (None, "none"):
        raise _unserved("bias", record.get("bias"), "none")
    init = record.get("init_lora_weights")
    # Other ways to begin, such as PiSSA's, change the base, so that the factors fit no donor.
    if not isinstance(init, bool | str | None) or init not in _INITS:
        raise _unserved("init_lora_weights", init, "true, gaussian, orthogonal or eva")
    for key, value in record.items():
        if key not in _KNOWN and value not in (None, False, [], {}, ""):
            raise _unserved(key, value, "absent")


def _unserved(key: str, value: object, served: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        f"{ADAPTER_CONFIG}: {key!r:.60} is {value!r:.60}, and only {served} is served. Merge the "
        "adapter into its base (PEFT's merge_and_unload) and onboard the checkpoint."
    )


def _pattern(fields: Fields, key: str) -> Fields:
    value = fields.record.get(key)
    if value is None:
        value = {}
    if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
        raise fields.refuse(key, value, "an object")
    for name in value:
        if not _PATTERN.fullmatch(name):
            raise UnsupportedFormatError(
                f"{ADAPTER_CONFIG}: {key} has {name!r:.60}; names of modules are read, regular "
                "expressions are not. Write the names out, or merge the adapter into its base."
            )
    return Fields(value, f"{ADAPTER_CONFIG}: {key}")


def _first(pattern: Mapping[str, _T], module: str, default: _T) -> _T:
    for key, value in pattern.items():
        name = key.removeprefix("^")
        if module == name or (name == key and module.endswith(f".{name}")):
            return value
    return default
