from __future__ import annotations

import torch

from tests.benchmarks.rivals import Form, sparse
from tests.benchmarks.surgeon import calibrated_sparse

NAME = "w"
ROWS, WIDTH, TOKENS = 16, 128, 512


def inputs() -> torch.Tensor:
    """Correlated, as those of a model are: a tenth as many directions as columns carry most."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(TOKENS, WIDTH // 10, generator=generator)
    mixed = few @ torch.randn(WIDTH // 10, WIDTH, generator=generator)
    return mixed + 0.3 * torch.randn(TOKENS, WIDTH, generator=generator)


def deltas() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def output_error(form: Form) -> float:
    """Of what the delta makes of the inputs, squared, as a share of it."""
    x_TI, delta_OI = inputs(), deltas()
    rebuilt = form(NAME, torch.zeros_like(delta_OI), delta_OI).weight_OI
    return float(
        (x_TI @ (rebuilt - delta_OI).T).square().sum() / (x_TI @ delta_OI.T).square().sum()
    )


def test_errors_are_made_good_where_inputs_are_correlated() -> None:
    moments = {NAME: inputs().T @ inputs()}
    assert output_error(calibrated_sparse(moments, 4)) < 0.5 * output_error(sparse(4))


def test_two_of_every_four_are_kept_and_the_bits_are_the_same() -> None:
    moments = {NAME: inputs().T @ inputs()}
    weight, num_bits = calibrated_sparse(moments, 4)(NAME, torch.zeros_like(deltas()), deltas())
    assert ((weight.view(-1, 4) != 0).sum(dim=1) == 2).all()
    assert num_bits == sparse(4)(NAME, torch.zeros_like(deltas()), deltas()).num_bits


def test_matrix_without_moments_is_kept_as_without_calibration() -> None:
    zeros = torch.zeros_like(deltas())
    form = calibrated_sparse({}, 4)
    assert torch.equal(form(NAME, zeros, deltas())[0], sparse(4)(NAME, zeros, deltas())[0])
