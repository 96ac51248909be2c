"""Settings of the engine process: one frozen record, built by the server, handed over as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, Self, TypeAlias

MatmulPrecision: TypeAlias = Literal["highest", "medium"]

UNUSABLE_DEVICE_STATUS = 3  # an engine's exit status when another start would fail the same way


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine process needs to know before its first model."""

    device: Literal["cpu", "cuda"] = "cpu"
    memory_budget_bytes: int | None = None  # weights and KV pages together; None: no limit of ours
    kv_cache_tokens: int = 16_384  # token slots of the KV cache of one family
    page_tokens: int = 16  # token slots of a page; a power of two
    max_batch_tokens: int = 256  # rows of a step; short enough for the heartbeat on two cores
    max_num_seqs: int = 64  # sequences running at once
    # torch's words: medium rounds the inputs of float32 products to bfloat16, on CPUs that then
    # multiply faster (AVX512_BF16); elsewhere it is highest.
    matmul_precision: MatmulPrecision = "highest"

    @property
    def served_precision(self) -> MatmulPrecision:
        """What products are computed with: medium is for CPUs alone."""
        return self.matmul_precision if self.device == "cpu" else "highest"

    def to_json(self) -> str:
        """Returns the record as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuilds the record; the text comes from `to_json`."""
        return cls(**json.loads(text))
