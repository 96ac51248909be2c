"""Models and jobs as JSON, for operators and for OpenAI's clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linker_core.engine.messages import Snapshot
from linker_core.sharing.plan import Policy
from server.gateway.schemas.operators import FOR_EVER_S
from server.onboarding.fitting import JointPlan
from server.onboarding.hub.source import is_hub_source
from server.onboarding.rates import remaining_s
from server.onboarding.rehearsal import DryRun
from server.onboarding.scores import plan_digest, shown_scores
from server.onboarding.twin_rows import is_lossless
from server.registry.records import JobRecord, Json, ModelRecord

_PLAN_FIELDS = (
    "policy", "tau_cos", "tau_frob", "mean_cos", "mean_epsilon", "region", "price", "budget_kl",
    "rung_bytes", "bits_per_weight",
)  # fmt: skip


def model_card(record: ModelRecord, snapshot: Snapshot | None) -> dict[str, Any]:
    """Returns everything an operator may know of a model.

    `bytes` are the ledger's where the model is resident and the plan's otherwise.
    """
    plan = record.plan
    return {
        "id": record.name,
        "object": "model",
        "state": record.state.value,
        # Directories of this machine are nobody's business.
        "source": record.source if is_hub_source(record.source) else None,
        "family": record.family,
        "donor": record.donor,
        "donor_choice": record.donor_choice,
        "fingerprint": record.fingerprint,
        "bytes": _bytes(record, snapshot),
        "blocks": None if plan is None else plan["blocks"],
        "plan": None if plan is None else _plan_card(plan),
        "max_model_len": record.max_model_len,
        "scores": shown_scores(record),
        "error": record.error,
        "created_at": record.created_at,
        "last_used_at": record.last_used_at,
        "alias": record.alias,
        "pinned": record.pinned,
        "keep_alive": -1 if record.keep_alive_s == FOR_EVER_S else record.keep_alive_s,
        # Whose tensors its family shares, where that is no model any more.
        "base": None if plan is None or record.donor is not None else plan["donor_fingerprint"],
    }


def openai_card(record: ModelRecord, *, name: str) -> dict[str, Any]:
    """Returns a servable model as OpenAI's clients read it.

    Args:
        record: As clients see it now.
        name: Its name or its alias.
    """
    return {
        "id": name,
        "object": "model",
        "created": int(record.created_at),
        "owned_by": "linker",
        "root": record.donor or record.name if name == record.name else record.name,
        "parent": record.donor,
        "max_model_len": record.max_model_len,
        "status": record.state.value,
    }


def job_card(job: JobRecord, *, bytes_per_second: float | None) -> dict[str, Any]:
    """Returns a job, with how fast its stage comes on where that is known."""
    rate = bytes_per_second
    return {
        "id": job.id,
        "object": "model.job",
        "model": job.model,
        "status": job.status.value,
        "stage": job.stage.value,
        "progress": {
            "done_bytes": job.done_bytes,
            "total_bytes": job.total_bytes,
            "bytes_per_second": rate,
            "remaining_seconds": None if rate is None else remaining_s(job, bytes_per_second=rate),
        },
        "error": job.error,
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "result": job.result,
    }


def dry_run_card(dry_run: DryRun, *, would_evict: Sequence[str] | None) -> dict[str, Any]:
    """Returns what a dry run found.

    Args:
        dry_run: What it found.
        would_evict: Who would leave for the model; None: it does not fit even so.
    """
    needs = dry_run.needs
    return {
        "object": "model.plan",
        "donor": dry_run.donor,
        "donor_choice": dry_run.donor_choice,
        "policy": dry_run.policy,
        "region": dry_run.region,
        "mean_cos": dry_run.mean_cos,
        "mean_epsilon": dry_run.mean_epsilon,
        "blocks": dry_run.blocks,
        "bytes": dry_run.bytes,
        "rung_bytes": dry_run.rung_bytes,
        "bits_per_weight": dry_run.bits_per_weight,
        "price": dry_run.price,
        "price_source": _price_source(dry_run.policy, dry_run.price),
        "budget_kl": dry_run.budget_kl,
        "within_budget": _is_within_budget(dry_run),
        "frontier": dry_run.frontier,
        "fits": would_evict is not None,
        "free_bytes": dry_run.free_bytes,
        "needed_bytes": {
            "total": needs.total,
            "unique": needs.unique,
            "base": needs.base,
            "kv": needs.kv,
            "donor": needs.donor,
        },
        "would_evict": list(would_evict or ()),
        "seconds": dry_run.seconds,
    }


def joint_card(joint: JointPlan) -> dict[str, Any]:
    """Returns the plans of several variants; what does not fit has none."""
    return {
        "object": "model.fit",
        "donor": joint.donor,
        "fits": joint.found.fits,
        "left_out": list(joint.found.left_out),
        "budget_bytes": joint.budget_bytes,
        "donor_bytes": joint.donor_bytes,
        "unique_bytes": joint.found.unique_bytes,
        "least_bytes": joint.least_bytes,
        "models": [_fitted_card(joint, name) for name in joint.frontiers],
        "seconds": joint.seconds,
    }


def _fitted_card(joint: JointPlan, name: str) -> dict[str, Any]:
    plan = joint.chosen(name)
    if plan is None:
        return {"name": name, "fits": False}
    return {
        "name": name,
        "fits": True,
        "unique_bytes": plan.unique_bytes,
        "bits_per_weight": 8 * plan.unique_bytes / joint.frontiers[name].num_weights,
        "rung_bytes": plan.rung_bytes,
        "price": plan.price.to_json(),
    }


def _plan_card(plan: Json) -> dict[str, Any]:
    shown = {name: plan[name] for name in _PLAN_FIELDS}
    source = _price_source(plan["policy"], plan["price"])
    return shown | {
        "price_source": source,
        "digest": plan_digest(plan),
        "lossless": is_lossless(plan),
    }


def _price_source(policy: str, price: Mapping[str, Any] | None) -> str | None:
    """Returns whether a price was measured here, or is the claim of who exported a delta."""
    if price is None:
        return None
    return "claimed" if policy == Policy.DELTA else "measured"


def _is_within_budget(dry_run: DryRun) -> bool | None:
    """Whether onboarding would get past the budget; None without a budget or a price.

    There is no budget where the price is claimed.
    """
    if dry_run.price is None or dry_run.budget_kl is None:
        return None
    within: bool = dry_run.price["kl_upper"] <= dry_run.budget_kl
    return within


def _bytes(record: ModelRecord, snapshot: Snapshot | None) -> dict[str, int] | None:
    plan = record.plan
    if plan is None:
        return None
    held = None if snapshot is None else snapshot.models.get(record.name)
    logical = plan["logical_bytes"] if held is None else held.logical
    unique = plan["unique_bytes"] if held is None else held.unique
    return {
        "logical": logical,
        "unique": unique,
        "shared": plan["shared_bytes"] if held is None else held.shared,
        "saved": logical - unique,
        "checkpoint": plan["checkpoint_bytes"],
    }
