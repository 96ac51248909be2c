"""What the server and the engine process say to each other. Frozen records, no torch.

Both ends run the same installation and trust each other; the records travel pickled over a socket
pair. Token ids cross this boundary, text never does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from linker_core.sharing.plan import SharePlan
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Identity

_ENTRIES_AT_ONCE = 1024  # of a prompt, as Python's own numbers


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one sequence are chosen. Bounds are checked before it gets here."""

    max_tokens: int  # >= 1
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int | None = None  # >= 1
    min_p: float = 0.0  # [0, 1]
    seed: int | None = None
    frequency_penalty: float = 0.0  # [-2, 2]
    presence_penalty: float = 0.0  # [-2, 2]
    repetition_penalty: float = 1.0  # > 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> additive bias
    min_tokens: int = 0  # stop ids cannot be chosen before
    # The model's own, unless ignore_eos, and the user's.
    stop_token_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that never become complete
    allowed_token_ids: frozenset[int] | None = None  # None: all; never empty
    grammar: str | None = None  # what llguidance compiles; the answer follows it
    logprobs: int | None = None  # how many alternatives to report; None reports nothing
    prompt_logprobs: int | None = None  # the same for the prompt's tokens


# --- server -> engine -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFiles:
    """The checkpoint whose tensors a plan aliases: read where they are not resident."""

    path: str
    identity: Identity  # of the weight files at validation
    config: ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadModel:
    """Make a model resident. `donor` is None for the first model of a family.

    If it replaces, the model is resident with another plan: new requests go to this one once it is
    loaded, running sequences end on the old one, which leaves with the last of them. Until then,
    and if it fails, the old one serves.
    """

    model: str
    path: str  # of the checkpoint, or of the delta folder of a plan with residuals
    identity: Identity  # of the weight files at validation
    config: ModelConfig  # as validated
    plan: SharePlan
    donor: str | None  # the head of the family that it joins; None: it founds one
    max_model_len: int | None
    replaces: bool = False
    base: BaseFiles | None = None  # what the plan was made against; None: a plain donor


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelLoad:
    """Stop loading a model, or what is to replace it; what is resident stays so.

    A name that is not being loaded is ignored.
    """

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadModel:
    """Give a model's unique bytes back. Its running sequences finish first.

    The donor of a family leaves only with an heir: a resident variant that is the family's donor at
    once. What others alias stays where it is; the rest goes with its last sequence.
    """

    model: str
    heir: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """One sequence to generate. `request_id` is the server's own and unique."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0  # smaller is sooner
    cache_salt: str = ""  # cached prefixes are found under the same salt alone
    tenant: str = ""  # tenants have equal shares of a variant's steps, and salts of their own
    # How long it may wait for its first step before it is refused; None: for ever.
    start_within_s: float | None = None
    # Monotonic seconds, of CLOCK_MONOTONIC, which is the same for every process of a machine. The
    # engine reads commands between its steps only. None: when it reads this one.
    submitted_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Forget a sequence; unknown or finished ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Set memory of the engine's device aside for another process, such as a tuner."""

    name: str  # whose it is, unique among reservations
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Give a reservation back; unknown names are ignored."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Leave now; the server has drained what it wanted to drain."""


Command = LoadModel | CancelLoad | UnloadModel | Submit | Abort | Reserve | Release | Shutdown

# --- engine -> server -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReady:
    """The first message: the engine reads commands now."""

    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprob:
    """How likely a token of the prompt was after those before it."""

    token_id: int
    logprob: float
    rank: int  # 1 for the likeliest
    top_logprobs: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptScores:
    """An entry for every token of a prompt but its first, as arrays; made when it is read.

    A long prompt has hundreds of thousands of numbers: whoever reads them takes the time, not the
    engine's loop.
    """

    token_ids: npt.NDArray[np.int32]  # [P]
    logprobs: npt.NDArray[np.float32]  # [P]
    ranks: npt.NDArray[np.int64]  # [P]
    top_ids: npt.NDArray[np.int32]  # [P, C]
    top_values: npt.NDArray[np.float32]  # [P, C]

    def __iter__(self) -> Iterator[PromptLogprob]:
        columns = (self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_values)
        for first in range(0, len(self.token_ids), _ENTRIES_AT_ONCE):
            part = (column[first : first + _ENTRIES_AT_ONCE].tolist() for column in columns)
            for token_id, logprob, rank, ids, values in zip(*part, strict=True):
                yield PromptLogprob(
                    token_id=token_id,
                    logprob=logprob,
                    rank=rank,
                    top_logprobs=tuple(zip(ids, values, strict=True)),
                )


class TokenOutput(NamedTuple):
    """One new token of one sequence; a tuple, which is made in a fraction of a record's time."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    # With the first token only, as all that follows. The prompt's first token has no entry.
    prompt_logprobs: Iterable[PromptLogprob] | None = None
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache
    queued_s: float | None = None  # from its submission to the first step that computed it


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """All tokens of one step, one message."""

    tokens: tuple[TokenOutput, ...]

    def __reduce__(self) -> tuple[Callable[[tuple[_Row, ...]], StepOutput], tuple[object]]:
        # Records are pickled and read by Python code, field by field, which is most of what a token
        # costs between the processes; plain tuples are not.
        return _step_output, (tuple(map(tuple, self.tokens)),)


_Row = tuple[object, ...]  # the fields of a token


def _step_output(rows: tuple[_Row, ...]) -> StepOutput:
    """Returns the step that was pickled as the fields of its tokens."""
    return StepOutput(tokens=tuple(map(TokenOutput._make, rows)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """A sequence ended by a fault of its own; `error` is a `LinkerError.to_record`."""

    request_id: str
    error: Mapping[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """Bytes moved so far of a model being loaded."""

    model: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """Bytes of a resident model, derived from the ledger."""

    logical: int
    unique: int
    shared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoaded:
    """A model can take requests: it has given a token, which nobody got."""

    model: str
    bytes: ModelBytes
    max_model_len: int
    alias_seconds: float  # opening, binding, bookkeeping: all that moves no byte
    move_seconds: float  # reading and moving bytes; steps run meanwhile are not counted
    first_token_seconds: float = 0.0  # of the token that shows that it can answer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """A model could not be made resident; everything is as it was before."""

    model: str
    error: Mapping[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUnloaded:
    """A model's unique bytes are free again."""

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadFailed:
    """A model stays as it is, because others lean on it."""

    model: str
    error: Mapping[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """The memory is set aside until its release."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveFailed:
    """It does not fit, or the name has a reservation already."""

    name: str
    error: Mapping[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoad:
    """Sequences of one model, for the gauges."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The engine's state: twice a second while it changes, and before the event that ends a wait.

    One follows `EngineReady`, so that a fresh engine's is known before its first command.
    Whoever waited for a load, an unload, a reservation or their failure finds what came of it here.
    """

    models: Mapping[str, ModelBytes]
    load: Mapping[str, ModelLoad]
    device: str
    device_weight_bytes: int
    device_kv_bytes: int
    device_free_bytes: int  # of the memory budget, or of the device where none is set
    reserved_bytes: int  # set aside for other processes, as long as those run
    kv_usage_ratio: float  # pages in use / pages, over all families
    num_preemptions: int  # since the start
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache, since the start
    prefix_hits: int = 0  # those found
    # Steps by how many distinct models they computed for, since the start.
    batch_variants: Mapping[int, int] = field(default_factory=dict)
    # Of models that were replaced: what is in `device_weight_bytes` until their sequences end.
    leaving_bytes: int = 0
    arriving_bytes: int = 0  # promised to a model that is being loaded, and not its yet

    @property
    def unreserved_bytes(self) -> int:
        """What is free once the other processes have ended."""
        return self.device_free_bytes + self.reserved_bytes

    @property
    def num_steps(self) -> int:
        """Batches computed since the start."""
        return sum(self.batch_variants.values())


Event = (
    EngineReady
    | StepOutput
    | RequestFailed
    | LoadProgress
    | ModelLoaded
    | LoadFailed
    | ModelUnloaded
    | UnloadFailed
    | Reserved
    | ReserveFailed
    | Snapshot
)
