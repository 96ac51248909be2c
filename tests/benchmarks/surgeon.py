"""DeltaZip's calibration: what rounding a column costs is made good by the columns after it.

The optimal brain surgeon as SparseGPT (Frantar and Alistarh 2023) orders it, on the delta, over the
inputs that a matrix sees on a text. Legend: O, I of a weight, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from linker_core.tuning.calibration import CalibrationText
from tests.benchmarks.rivals import Form, Rebuilt, sparse

_DAMPING = 0.01  # of the mean second moment


def second_moments(model: PreTrainedModel, text: CalibrationText) -> dict[str, torch.Tensor]:
    """Returns XᵀX [I, I] of the inputs of each linear module of the blocks, by weight."""
    moments: dict[str, torch.Tensor] = {}

    def watch(name: str, module: torch.nn.Linear) -> None:
        moments[name] = torch.zeros(module.in_features, module.in_features)

        def add(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x_TI = args[0].flatten(0, 1)
            moments[name] += x_TI.T @ x_TI

        hooks.append(module.register_forward_pre_hook(add))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in path:
            watch(f"{path}.weight", module)
    with torch.inference_mode():
        for sequence in text.sequences:
            model(torch.tensor([sequence.token_ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return moments


def calibrated_sparse(moments: Mapping[str, torch.Tensor], bits: int, *, group: int = 64) -> Form:
    """Returns `rivals.sparse` with its errors made good; what has no moments is kept without.

    Args:
        moments: Of `second_moments`.
        bits: Of a kept value's code.
        group: Kept values of a row that share a scale.
    """
    plain = sparse(bits, group=group)

    def form(name: str, donor_OI: torch.Tensor, variant_OI: torch.Tensor) -> Rebuilt:
        rebuilt = plain(name, donor_OI, variant_OI)
        if name not in moments:
            return rebuilt
        delta_OI = _made_good(variant_OI - donor_OI, moments[name], bits=bits, weights=2 * group)
        return Rebuilt(donor_OI + delta_OI, rebuilt.num_bits)

    return form


def _made_good(
    delta_OI: torch.Tensor, moments_II: torch.Tensor, *, bits: int, weights: int
) -> torch.Tensor:
    """Prunes two of every four and rounds the rest, column after column.

    Args:
        delta_OI: What is kept.
        moments_II: Of the inputs.
        bits: Of a code.
        weights: Of a row, kept or not, that share a scale.
    """
    damped = moments_II + _DAMPING * moments_II.diagonal().mean() * torch.eye(len(moments_II))
    # Row i of the factor says how an error in column i is spread over those after it.
    spread_II = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left_OI = delta_OI.clone()
    out_OI = torch.zeros_like(left_OI)
    half = 2 ** (bits - 1)
    scale_O1 = keep_O4 = torch.empty(0)
    for i in range(left_OI.shape[1]):
        if i % weights == 0:
            scale_O1 = _scales(left_OI[:, i : i + weights], half)
        if i % 4 == 0:
            harm_O4 = (left_OI[:, i : i + 4] / spread_II.diagonal()[i : i + 4]).square()
            keep_O4 = torch.zeros_like(harm_O4).scatter_(1, harm_O4.topk(2).indices, 1.0)
        value_O1 = left_OI[:, i : i + 1]
        codes_O1 = (value_O1 / scale_O1).floor().clamp(-half, half - 1)
        out_OI[:, i : i + 1] = (codes_O1 + 0.5) * scale_O1 * keep_O4[:, i % 4 : i % 4 + 1]
        error_O1 = (value_O1 - out_OI[:, i : i + 1]) / spread_II[i, i]
        left_OI[:, i + 1 :] -= error_O1 @ spread_II[i : i + 1, i + 1 :]
    return out_OI


def _scales(weights_On: torch.Tensor, half: int) -> torch.Tensor:
    """Returns the scale [O, 1] with which the larger two of every four are rounded best."""
    fours = weights_On.reshape(len(weights_On), -1, 4)
    kept_On = fours.abs().topk(2, dim=2).values.flatten(1)
    widest_O1 = kept_On.amax(dim=1, keepdim=True) / (half - 0.5)
    best_O1 = widest_O1.clone()
    least_O1 = torch.full_like(widest_O1, torch.inf)
    for clip in torch.linspace(0.4, 1.0, 25):
        scale_O1 = (clip * widest_O1).bfloat16().float().clamp_min(1e-30)
        codes_On = (kept_On / scale_O1).floor().clamp(0, half - 1)
        error_O1 = ((codes_On + 0.5) * scale_O1 - kept_On).square().sum(dim=1, keepdim=True)
        best_O1 = torch.where(error_O1 < least_O1, scale_O1, best_O1)
        least_O1 = torch.minimum(error_O1, least_O1)
    return best_O1
