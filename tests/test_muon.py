import pytest
import torch
from torch import nn

from engine.muon import Muon, orthogonalised

SETTINGS = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}


def gradients(shape, count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def trained(optimizer, parameter, given):
    for gradient in given:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(32, 32), (16, 144), (200, 64)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    (matrix,) = gradients(shape, 1)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalised(matrix) @ v.T
    values = inner.diagonal()
    assert torch.allclose(inner, torch.diag(values), atol=1e-4)
    assert values[: min(shape) // 2].min() > 0.6  # the smallest one of a square matrix may be near 0
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(32, 64), (64, 32)])
def test_a_matrix_takes_the_steps_of_torch_s_muon(shape):
    start, *given = gradients(shape, 6)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    found = trained(Muon([ours], **SETTINGS), ours, given)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    expected = trained(reference, theirs, given)
    moved = (expected - start).norm()
    assert (found - expected).norm() < 0.03 * moved  # theirs multiplies in bfloat16


def test_a_convolution_is_the_matrix_of_its_filters():
    start, *given = gradients((32, 16, 3, 3), 4)
    filters, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1))
    found = trained(Muon([filters], **SETTINGS), filters, given)
    expected = trained(Muon([matrix], **SETTINGS), matrix, [one.flatten(1) for one in given])
    assert torch.allclose(found.flatten(1), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (8, 1, 3, 3)])
def test_what_is_no_wide_matrix_takes_the_steps_of_torch_s_adamw(shape):
    start, *given = gradients(shape, 6)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    found = trained(Muon([ours], **SETTINGS), ours, given)
    expected = trained(torch.optim.AdamW([theirs], **SETTINGS), theirs, given)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_parameter_without_a_gradient_stays():
    parameter = nn.Parameter(torch.ones(32, 32))
    Muon([parameter], **SETTINGS).step()
    assert torch.equal(parameter, torch.ones(32, 32))
