"""Every family of metrics that a server exposes: its name, what it says, its labels, its buckets.

The one table that documentation, recording rules, dashboards and tests are checked against. Knows
no value and no library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Kind(StrEnum):
    """What a family's samples are, in Prometheus' words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family. A counter's name ends in `_total`."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper edges, ascending, without +Inf; of histograms only

    @property
    def samples(self) -> tuple[str, ...]:
        """The names to query."""
        if self.kind is Kind.HISTOGRAM:
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)


def _counter(name: str, what: str, *labels: str) -> Family:
    return Family(name=name, kind=Kind.COUNTER, help=what, labels=labels)


def _gauge(name: str, what: str, *labels: str) -> Family:
    return Family(name=name, kind=Kind.GAUGE, help=what, labels=labels)


def _histogram(name: str, what: str, *labels: str, buckets: tuple[float, ...]) -> Family:
    return Family(name=name, kind=Kind.HISTOGRAM, help=what, labels=labels, buckets=buckets)


def _one_two_five(largest: int) -> tuple[float, ...]:
    """Returns 1, 2, 5, 10, 20, 50 … up to `largest`."""
    steps = (digit * 10.0**power for power in range(len(str(largest))) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= largest)


# vLLM's, so that its dashboards and ours can be held against each other.
_TOKEN_TIMES_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_PHASE_TIMES_S = (
    0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0,
)  # fmt: skip
_TOKEN_COUNTS = _one_two_five(200_000)
_ADMISSION_TIMES_S = (
    0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0,
)  # fmt: skip
_VARIANT_COUNTS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)

_MEMORY = (
    _gauge(
        "linker_model_weight_bytes",
        "Weights of a resident model: what a separate copy would hold (logical), what only it "
        "holds (unique), what it reads from its donor (shared).",
        "model", "family", "kind",
    ),
    _gauge("linker_family_weight_bytes", "Weights that a family holds.", "family"),
    _gauge(
        "linker_device_memory_bytes",
        "Memory of the device by use: weights, kv, free, or other (set aside or being loaded).",
        "device", "state",
    ),
    _gauge("linker_model_state", "1 for the state a model is in.", "model", "state"),
)  # fmt: skip
_SHARING = (
    _gauge("linker_model_blocks", "Blocks by the rung they are stored at.", "model", "rung"),
    _gauge(
        "linker_model_rung_bytes",
        "Bytes that only the model holds, by the kind of rung they are on.",
        "model", "rung",
    ),
    _gauge(
        "linker_model_bits_per_weight",
        "Bits that only the model holds for each of its weights.",
        "model",
    ),
    _gauge("linker_block_cosine", "Cosine of a block and the donor's.", "model", "block"),
    _gauge(
        "linker_block_epsilon",
        "Relative Frobenius distance of a block from the donor's.",
        "model", "block",
    ),
    _gauge(
        "linker_block_rung",
        "1 for the dearest rung among a block's matrices: alias, residual or own.",
        "model", "block", "rung",
    ),
    _gauge(
        "linker_block_unique_bytes",
        "Bytes of a block that only the model holds when it is resident.",
        "model", "block",
    ),
    _gauge(
        "linker_section_unique_bytes",
        "Bytes of a section (embed, blocks, final_norm, lm_head) that only the model holds when "
        "it is resident.",
        "model", "section",
    ),
)  # fmt: skip
_FIDELITY = (
    _gauge(
        "linker_plan_kl_nats", "Measured KL(variant || planned) per response token.", "model"
    ),
    _gauge(
        "linker_plan_kl_upper_nats",
        "Upper end of the confidence interval of the measured KL(variant || planned).",
        "model",
    ),
    _gauge(
        "linker_plan_budget_kl_nats",
        "What the upper end of a plan's measured KL may be.",
        "model",
    ),
    _gauge(
        "linker_plan_top1_agreement_ratio",
        "Measured share of response tokens where plan and variant prefer the same token.",
        "model",
    ),
    _gauge(
        "linker_plan_perplexity_ratio",
        "Perplexity under the plan over that of the variant.",
        "model",
    ),
)  # fmt: skip
_ONBOARDING = (
    _histogram(
        "linker_admission_seconds",
        "What an admission that succeeded spent in a stage; skipped stages are left out.",
        "stage",
        buckets=_ADMISSION_TIMES_S,
    ),
    _counter("linker_admissions_total", "Onboarding jobs by how they ended.", "outcome"),
    _counter("linker_evictions_total", "Models that left the device, by why.", "reason"),
)
_REQUESTS = (
    _gauge("linker_num_requests_running", "Sequences running in the engine.", "model"),
    _gauge("linker_num_requests_waiting", "Sequences waiting in the engine.", "model"),
    _counter(
        "linker_request_success_total",
        "Sequences that ended, by how they ended.",
        "model", "finished_reason",
    ),
    _counter("linker_rejections_total", "Requests refused, by reason.", "reason"),
    _counter(
        "linker_prompt_tokens_total",
        "Tokens of prompts that were processed, those found in the prefix cache included.",
        "model",
    ),
    _counter("linker_generation_tokens_total", "Tokens generated.", "model"),
    _histogram(
        "linker_request_prompt_tokens",
        "Prompt tokens of a sequence that ran to its end.",
        "model",
        buckets=_TOKEN_COUNTS,
    ),
    _histogram(
        "linker_request_generation_tokens",
        "Generated tokens of a sequence that ran to its end.",
        "model",
        buckets=_TOKEN_COUNTS,
    ),
)  # fmt: skip
_LATENCY = (
    _histogram(
        "linker_time_to_first_token_seconds",
        "From the arrival of a request to its first token.",
        "model",
        buckets=_TOKEN_TIMES_S,
    ),
    _histogram(
        "linker_inter_token_latency_seconds",
        "From one token of a sequence to the next, as the engine gives them.",
        "model",
        buckets=_TOKEN_TIMES_S,
    ),
    _histogram(
        "linker_request_time_per_output_token_seconds",
        "Mean time from token to token of a sequence that ran to its end.",
        "model",
        buckets=_TOKEN_TIMES_S,
    ),
    _histogram(
        "linker_e2e_request_latency_seconds",
        "From the arrival of a request to its last token, of those that ran to their end.",
        "model",
        buckets=_PHASE_TIMES_S,
    ),
    _histogram(
        "linker_request_queue_time_seconds",
        "From the submission of a sequence to the engine to the first step that computes it.",
        "model",
        buckets=_PHASE_TIMES_S,
    ),
    _histogram(
        "linker_request_prefill_time_seconds",
        "From the first step that computes a sequence to its first token.",
        "model",
        buckets=_PHASE_TIMES_S,
    ),
    _histogram(
        "linker_request_decode_time_seconds",
        "From the first token of a sequence to its last.",
        "model",
        buckets=_PHASE_TIMES_S,
    ),
    _histogram(
        "linker_request_inference_time_seconds",
        "From the first step that computes a sequence to its last token.",
        "model",
        buckets=_PHASE_TIMES_S,
    ),
)
_ANALYSIS = (
    _gauge(
        "linker_delta_norm",
        "Norm of what fine-tuning added to a tensor, the mean over the tensors that were studied.",
        "model",
    ),
    _gauge(
        "linker_pc1_variance_ratio",
        "Share of the variance between a family's fine-tunes that their first principal component "
        "explains (centred), the mean over a component's tensors; of three fine-tunes or more.",
        "family", "component",
    ),
    _gauge(
        "linker_pc1_null_ratio",
        "What 95 % of such shares are below where the fine-tunes have nothing in common.",
        "family", "component",
    ),
    _gauge(
        "linker_pairwise_cosine",
        "Cosine between what two fine-tunes of a family added, the mean over pairs and tensors.",
        "family",
    ),
    _gauge(
        "linker_kernel_acceptance_ratio",
        "Share of proposals that the sampler of a family's kernel accepted.",
        "family",
    ),
    _gauge(
        "linker_kernel_snr",
        "Norm of the mean of a family's deltas over the root mean square of what they differ from "
        "it by, the mean over a component's tensors.",
        "family", "component",
    ),
    _gauge(
        "linker_jackknife_cosine",
        "Cosine between a family's first principal component with a fine-tune and without it, the "
        "mean over tensors; of four fine-tunes or more.",
        "family", "model",
    ),
    _gauge(
        "linker_diagnostic",
        "1 for what the analysis found of a model, else 0.",
        "model", "kind",
    ),
    _gauge(
        "linker_analysis_age_seconds",
        "Since the study of a family's fine-tunes ended that is shown.",
        "family",
    ),
    _counter(
        "linker_analysis_seconds_total",
        "Time for which families were studied, while sequences ran (running) and else (none).",
        "sequences",
    ),
    _counter(
        "linker_analysis_cpu_seconds_total",
        "CPU time of studies of families, while sequences ran (running) and else (none).",
        "sequences",
    ),
)  # fmt: skip
_ENGINE = (
    _gauge("linker_engine_up", "1 while the engine runs and progresses, 0 otherwise."),
    _counter("linker_engine_restarts_total", "Engine processes that replaced one that ended."),
    _counter("linker_engine_steps_total", "Batches computed since the engine's start."),
    _histogram(
        "linker_batch_variants",
        "Distinct variants that a step computed for, since the engine's start.",
        buckets=_VARIANT_COUNTS,
    ),
    _gauge("linker_kv_cache_usage_ratio", "KV pages in use, of all."),
    _counter(
        "linker_num_preemptions_total",
        "Sequences put back to make room since the engine's start.",
    ),
    _counter(
        "linker_prefix_cache_queries_total",
        "Prompt tokens looked up in the prefix cache since the engine's start.",
    ),
    _counter(
        "linker_prefix_cache_hits_total",
        "Prompt tokens found in the prefix cache since the engine's start.",
    ),
)
# The server's own process, as every client library of Prometheus names it; the engine is another.
_PROCESS = (
    _gauge("linker_build_info", "1; the version is the label.", "version"),
    _gauge("process_virtual_memory_bytes", "Virtual memory size in bytes."),
    _gauge("process_resident_memory_bytes", "Resident memory size in bytes."),
    _gauge("process_start_time_seconds", "Start time of the process since unix epoch in seconds."),
    _counter("process_cpu_seconds_total", "Total user and system CPU time spent in seconds."),
    _gauge("process_open_fds", "Number of open file descriptors."),
    _gauge("process_max_fds", "Maximum number of open file descriptors."),
)


def _table(*groups: Sequence[Family]) -> Mapping[str, Family]:
    return MappingProxyType({family.name: family for group in groups for family in group})


FAMILIES = _table(
    _MEMORY, _SHARING, _FIDELITY, _ONBOARDING, _REQUESTS, _LATENCY, _ANALYSIS, _ENGINE, _PROCESS
)  # by name
