"""Muon (Jordan et al. 2024): momentum whose update of a matrix is made orthogonal."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
SMALLEST_MATRIX = 16  # along the shorter side: below, as for biases and gains, it is AdamW's
POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: steep at 0, so that five steps are enough
ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """(M, N) -> U V^T of its singular value decomposition, roughly: singular values from 0.7 to 1.2.

    The Newton-Schulz iteration X <- (a + b X X^T + c (X X^T)^2) X, of X over its norm.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.T).T
    a, b, c = POLYNOMIAL
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    gram = matrix @ matrix.T
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    product = identity
    # All steps multiply from the left by polynomials of one small matrix: gather them there. In float32,
    # since torch.optim.Muon's bfloat16 is 2 to 20 times slower on a CPU that has no instructions for it.
    for _ in range(ITERATIONS):
        step = a * identity + b * gram + c * gram @ gram
        product = step @ product
        gram = step @ gram @ step
    return product @ matrix


class Muon(torch.optim.Optimizer):
    """Muon for the matrices (of a convolution: out x rest), AdamW (Loshchilov & Hutter 2019) for the rest.

    Steps have the size of AdamW's, so learning rates carry over (Liu et al. 2025, Eq. 4).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        groups: list[dict[str, Any]] = [{"params": [], "matrices": matrices} for matrices in (True, False)]
        for one in parameters:
            is_matrix = one.ndim >= 2 and min(one.shape[0], one[0].numel()) >= SMALLEST_MATRIX
            groups[not is_matrix]["params"].append(one)
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure: the gradients are there
        """Change the parameters that have a gradient."""
        for group in self.param_groups:
            update = self._muon if group["matrices"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, group)

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        matrix = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
        scale = 0.2 * math.sqrt(max(matrix.shape))  # the root mean square of AdamW's steps
        parameter.add_(orthogonalised(matrix).view_as(parameter), alpha=-scale * group["lr"])

    def _adamw(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        state["step"] += 1
        mean = state["mean"].lerp_(gradient, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2 ** state["step"])).sqrt_().add_(1e-8)
        parameter.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta1 ** state["step"]))
