"""The paper's primitive as a library call: a model whose parameters are a donor's storages."""

from __future__ import annotations

from contextlib import ExitStack
from os import PathLike
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.residency.loader import read_tensor
from linker_core.residency.skeleton import build_skeleton
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_donor, plan_variant
from linker_core.sharing.rungs import Rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint
from linker_core.weights.generation import GENERATION_FILE

_POLICIES = {
    "thresholds": Policy.THRESHOLDS,
    "exact": Policy.EXACT,
}


def load_linked(
    variant: str | PathLike[str],
    donor: PreTrainedModel | str | PathLike[str],
    *,
    policy: str = "thresholds",
    tau_cos: float | None = None,
    tau_frob: float | None = None,
    tier: str | None = None,
) -> PreTrainedModel:
    """Loads a variant that aliases its donor (BS algorithm 1); use it like any other model.

    Aliased parameters are the donor's own `Parameter` objects (`param_B.data = param_A.data`, BS
    §4): no byte of them is read or copied. The rest is moved to the donor's device in the donor's
    type. An embedding or head of which only some rows are the donor's is moved whole: a parameter
    is one tensor. Training one model would train the other, so gradients are off on what is loaded
    here.

    Args:
        variant: Directory of the variant's checkpoint.
        donor: A model loaded from a local directory (`from_pretrained`), or such a directory.
        policy: "thresholds" (BS Eq. 3) or "exact" (equal bytes only).
        tau_cos: Least cosine of a shared block; together with `tau_frob`.
        tau_frob: Largest ε of a shared block.
        tier: A row of families.yaml in place of the two numbers.

    Raises:
        BadCheckpointError: A checkpoint is damaged, the two are no family, or the donor model does
            not come from a local directory.
        InvalidRequestError: An unknown policy, or contradicting thresholds.
    """
    if policy not in _POLICIES:
        raise InvalidRequestError(
            f"policy is {policy!r:.40}, expected one of {', '.join(_POLICIES)}.", param="policy"
        )
    lender = donor if isinstance(donor, PreTrainedModel) else load_plain(donor)
    donor_path = Path(lender.name_or_path or "")
    if not lender.name_or_path or not donor_path.is_dir():
        raise BadCheckpointError(
            "The donor model does not say which local directory it was loaded from "
            "(name_or_path). Load it with from_pretrained(directory)."
        )
    with ExitStack() as stack:
        donor_checkpoint = stack.enter_context(Checkpoint.open(donor_path))
        checkpoint = stack.enter_context(Checkpoint.open(Path(variant)))
        plan = plan_variant(
            scan(donor_checkpoint, checkpoint),
            donor_checkpoint,
            checkpoint,
            policy=_POLICIES[policy],
            fingerprints=Fingerprints(fingerprint(donor_checkpoint), fingerprint(checkpoint)),
            tau_cos=tau_cos,
            tau_frob=tau_frob,
            tier=tier,
        )
        return _assemble(checkpoint, plan, lender)


def load_plain(path: str | PathLike[str]) -> PreTrainedModel:
    """Loads a model that shares nothing, on the CPU and in its checkpoint's type.

    Raises:
        BadCheckpointError: See `Checkpoint.open`.
    """
    with Checkpoint.open(Path(path)) as checkpoint:
        return _assemble(checkpoint, plan_donor(checkpoint, fingerprint=""), None)


def _assemble(
    checkpoint: Checkpoint, plan: SharePlan, lender: PreTrainedModel | None
) -> PreTrainedModel:
    """Returns a skeleton filled with the lender's parameters and the checkpoint's own."""
    device = lender.device if lender else torch.device("cpu")
    config = checkpoint.config
    dtype = lender.dtype if lender else getattr(torch, config.dtype)
    model = build_skeleton(config, device=device, dtype=dtype)
    for name, rung in plan.rungs.items():
        if rung is Rung.ALIAS:
            assert lender is not None
            parameter = lender.get_parameter(name)
        else:
            tensor = read_tensor(checkpoint, name, device=device)
            parameter = nn.Parameter(tensor.to(dtype), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
    model.tie_weights()
    if (checkpoint.path / GENERATION_FILE).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    model.name_or_path = str(checkpoint.path)
    return model
