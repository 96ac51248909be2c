"""The state of one sequence from submission to its last token. Owned by the engine loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from linker_core.engine.messages import FinishReason, SamplingParams
from linker_core.engine.page_table import PageTable
from linker_core.engine.prefix import PageKeys


@dataclass(slots=True, eq=False)
class SequenceState:
    """One sequence. Equality is identity."""

    request_id: str
    model: str
    slot: int
    vocab_size: int  # the variant's own; every token id lies below it
    tokens: list[int]  # the prompt, then what was generated
    num_prompt: int  # >= 1
    sampling: SamplingParams
    arrival: int  # order of submission; smaller is older
    submitted_s: float = 0.0  # monotonic seconds
    priority: int = 0  # smaller is sooner
    tenant: str = ""  # whose it is
    key_root: bytes | None = None  # of its pages' keys; None: its pages are its own
    num_computed: int = 0  # positions whose keys and values lie in the cache; < len(tokens)
    num_committed: int = 0  # pages of the table that others may read
    num_cached: int | None = None  # prompt tokens found in the cache when it was first admitted
    queued_s: float | None = None  # until the first step that computed it
    table: PageTable = field(default_factory=PageTable)
    page_keys: PageKeys = field(init=False)

    def __post_init__(self) -> None:
        self.page_keys = PageKeys(self.key_root)

    @property
    def lane(self) -> tuple[int, str]:
        """Whose share of the steps it takes: one tenant's of one variant."""
        return self.slot, self.tenant

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_missing(self) -> int:
        """Positions still to be computed before the next token; 1 for a decode."""
        return len(self.tokens) - self.num_computed

    @property
    def urgency(self) -> tuple[int, int]:
        """Smaller goes first; no two sequences have the same."""
        return self.priority, self.arrival

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether the logits of every row are needed, as long as no token was chosen."""
        return self.sampling.prompt_logprobs is not None and self.num_output == 0

    def append(self, token_id: int) -> FinishReason | None:
        """Takes a chosen token and says whether it is the last one."""
        self.tokens.append(token_id)
        if token_id in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if self.num_output >= self.sampling.max_tokens:
            return FinishReason.LENGTH
        return None
