"""Everything that FM says about one tensor, from its Gram matrices.

Legend: N fine-tunes, C runs of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.gram import TensorGram
from analysis.null import (
    cosine_null95,
    generator,
    interval,
    judge,
    resampled,
    sign_flips,
)
from analysis.pca import (
    Spectrum,
    cosines,
    mean_cosine,
    norms,
    pc1_shares,
    signal_to_noise,
    spectrum,
)
from analysis.record import TensorStudy, triangle
from analysis.selection import component_of, layer_of
from analysis.stability import leave_one_out

NUM_DRAWS = 1000
MIN_PC1 = 3  # centred with two fine-tunes, PC1 is 100 % by construction
# Of Gram matrices that are drawn at once: 1 MiB, and a few times that to judge; the least time
# between two rests, some hundredths of a second however many fine-tunes there are.
_MAX_ENTRIES = 2**17
_STEP_DRAWS = 4  # signs are drawn as bytes of one word: other steps would draw others
SINGLE_SOURCE = 0.8  # squared loading above which PC1 is one fine-tune's own


def _no_rest() -> None:
    """Goes on at once."""


def study_tensor(
    gram: TensorGram,
    *,
    names: Sequence[str],
    seed: int,
    num_draws: int = NUM_DRAWS,
    rest: Callable[[], None] = _no_rest,
) -> TensorStudy:
    """Returns what one tensor's Gram matrices say.

    Deterministic in the tensor, its name and the seed, whichever tensors were studied before.

    Args:
        gram: Of the tensor.
        names: Of the N fine-tunes, in the Gram matrix's order.
        seed: Of the null's signs and of the bootstrap.
        num_draws: Of each; a p-value is at least 1/(num_draws + 1).
        rest: Called after every piece of the work.
    """
    gram_NN = gram.gram_NN
    assert len(names) == len(gram_NN)
    rng = generator(seed, gram.name)
    num_models = len(names)
    return TensorStudy(
        **_identity(gram),
        **_sizes(gram),
        cosines_null95=triangle(cosine_null95(gram.groups_CNN)),
        cos_mean=mean_cosine(gram_NN) if num_models > 1 else None,
        snr=signal_to_noise(gram_NN) if num_models > 1 else None,
        **(
            _pca(gram, names, partial(_shares, rng=rng, num_draws=num_draws, rest=rest))
            if num_models >= MIN_PC1
            else _NO_PCA
        ),
        **_jackknife(gram_NN, rest),
        **(_two(gram, rng, num_draws) if num_models == 2 else _NOT_TWO),
    )


class _Kind(NamedTuple):
    """One way to do PCA, and what its fields are called."""

    suffix: str
    centred: bool
    normalised: bool


_KINDS = (
    _Kind("", centred=False, normalised=False),
    _Kind("_centred", centred=True, normalised=False),
    _Kind("_normalised", centred=False, normalised=True),
    _Kind("_normalised_centred", centred=True, normalised=True),
)


def _identity(gram: TensorGram) -> dict[str, Any]:
    component = component_of(gram.name)
    return {
        "name": gram.name,
        "component": None if component is None else component.value,
        "layer": layer_of(gram.name),
        "num_elements": int(np.prod(gram.shape)),
        "num_runs": len(gram.groups_CNN),
        "dtypes": tuple(gram.dtypes),
    }


def _sizes(gram: TensorGram) -> dict[str, Any]:
    norms_N = norms(gram.gram_NN)
    base = float(np.sqrt(gram.base_square))
    # As the scan has it: both zero is cos 1 and ε 0, one of them alone cos 0 and ε 1.
    epsilons_N = norms_N / base if base > 0.0 else (norms_N > 0.0).astype(np.float64)
    squares_N = gram.base_square + 2.0 * gram.base_dots_N + norms_N**2  # |W_i|²
    products_N = base * np.sqrt(np.clip(squares_N, 0.0, None))
    cosines_N = np.where(norms_N > 0.0, 0.0, 1.0)
    np.divide(
        gram.base_square + gram.base_dots_N,
        products_N,
        out=cosines_N,
        where=(products_N > 0.0) & (norms_N > 0.0),
    )
    return {
        "base_square": gram.base_square,
        "gram": triangle(gram.gram_NN),
        "norms": tuple(norms_N.tolist()),
        "epsilons": tuple(epsilons_N.tolist()),
        "base_cosines": tuple(np.clip(cosines_N, -1.0, 1.0).tolist()),
    }


def _pca(
    gram: TensorGram,
    names: Sequence[str],
    shares: Callable[..., dict[str, NDArray[np.float64]]],
) -> dict[str, Any]:
    null, bootstrap = (shares(gram.groups_CNN, draw) for draw in (sign_flips, resampled))
    record: dict[str, Any] = dict(_NO_PCA)
    spectra: dict[str, Spectrum] = {}
    for kind in _KINDS:
        spectra[kind.suffix] = spectrum(
            gram.gram_NN, centred=kind.centred, normalised=kind.normalised
        )
        pc1 = spectra[kind.suffix].pc1
        if pc1 is None:
            continue
        verdict = judge(pc1, null[kind.suffix])
        record[f"pc1{kind.suffix}"] = pc1
        record[f"null95{kind.suffix}"] = verdict.null95
        record[f"p_value{kind.suffix}"] = verdict.p_value
        record[f"interval{kind.suffix}"] = interval(pc1, bootstrap[kind.suffix])
    raw, centred = spectra[""], spectra["_centred"]
    return record | {
        "spectrum": tuple(raw.shares_N.tolist()),
        "spectrum_centred": tuple(centred.shares_N.tolist()),
        "effective_rank": raw.effective_rank,
        "effective_rank_centred": centred.effective_rank,
        "loadings": tuple(centred.loadings.tolist()),
        "loadings_uncentred": tuple(raw.loadings.tolist()),
        "single_source": _single_source((raw, centred), names),
    }


def _shares(
    groups_CNN: NDArray[np.float64],
    draw: Callable[..., NDArray[np.float64]],
    *,
    rng: np.random.Generator,
    num_draws: int,
    rest: Callable[[], None],
) -> dict[str, NDArray[np.float64]]:
    """Returns each kind's PC1 [B] of matrices that are drawn, and dropped again, in batches."""
    step = max(1, _MAX_ENTRIES // groups_CNN.shape[1] ** 2 // _STEP_DRAWS) * _STEP_DRAWS
    batches = []
    for start in range(0, num_draws, step):
        grams_BNN = draw(groups_CNN, num_draws=min(step, num_draws - start), rng=rng)
        batches.append([
            pc1_shares(grams_BNN, centred=kind.centred, normalised=kind.normalised)
            for kind in _KINDS
        ])  # fmt: skip
        rest()
    shares_KB = np.concatenate(batches, axis=1)
    return {kind.suffix: shares_B for kind, shares_B in zip(_KINDS, shares_KB, strict=True)}


def _single_source(spectra: Sequence[Spectrum], names: Sequence[str]) -> str | None:
    """Returns the fine-tune that carries PC1 alone, uncentred or centred.

    The loadings of a centred PC1 sum to zero before they are squared, so that none exceeds
    1 - 1/N: with up to five fine-tunes only the uncentred PC1 can say so.
    """
    for one in spectra:
        strongest = int(one.loadings.argmax())
        if one.loadings[strongest] > SINGLE_SOURCE:
            return names[strongest]
    return None


def _jackknife(gram_NN: NDArray[np.float64], rest: Callable[[], None]) -> dict[str, Any]:
    centred = leave_one_out(gram_NN, centred=True)
    rest()
    raw = leave_one_out(gram_NN, centred=False)
    rest()
    return {
        "loo_cosines": centred.cosines if centred else (),
        "loo_pc1_shifts": centred.pc1_shifts if centred else (),
        "loo_cosines_uncentred": raw.cosines if raw else (),
        "loo_pc1_shifts_uncentred": raw.pc1_shifts if raw else (),
    }


def _two(gram: TensorGram, rng: np.random.Generator, num_draws: int) -> dict[str, Any]:
    """FM appendix B reports a shared fraction of two deltas and no formula.

    Here it is cos²: the part of either delta's energy that lies along the other.
    """
    null_BNN = sign_flips(gram.groups_CNN, num_draws=num_draws, rng=rng)
    bootstrap_BNN = resampled(gram.groups_CNN, num_draws=num_draws, rng=rng)
    observed = float(cosines(gram.gram_NN)[0, 1] ** 2)
    verdict = judge(observed, cosines(null_BNN)[:, 0, 1] ** 2)
    return {
        "shared_fraction": observed,
        "shared_null95": verdict.null95,
        "shared_p_value": verdict.p_value,
        "shared_interval": interval(observed, cosines(bootstrap_BNN)[:, 0, 1] ** 2),
    }


_NO_PCA: dict[str, Any] = {
    **{
        f"{field}{kind.suffix}": None
        for kind in _KINDS
        for field in ("pc1", "null95", "p_value", "interval")
    },
    "spectrum": (),
    "spectrum_centred": (),
    "effective_rank": None,
    "effective_rank_centred": None,
    "loadings": (),
    "loadings_uncentred": (),
    "single_source": None,
}
_NOT_TWO: dict[str, Any] = {
    "shared_fraction": None,
    "shared_null95": None,
    "shared_p_value": None,
    "shared_interval": None,
}
