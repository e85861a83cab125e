"""What a training step costs, counted on the meta device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

WEIGHTS, GRADIENTS, AVERAGE = 4, 4, 4  # bytes per parameter
MOMENTS = {"adamw": 8, "adamw8bit": 2, "muon": 4}


class Cost(NamedTuple):
    """Of one crop."""

    flops: int  # forward and backward, of convolutions, matrix products and attention
    activations: int  # bytes in float32 that the backward pass needs


def count_cost(network: nn.Module, work: Callable[[], Tensor]) -> Cost:
    """Of a forward pass of one crop, which gives a number, and its backward pass."""
    kept: dict[int, Tensor] = {}  # by storage; held, so that no number is given twice
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one),
    ):
        work().backward()
    sizes = [one.untyped_storage().nbytes() for key, one in kept.items() if key not in weights]
    return Cost(int(counter.get_total_flops()), sum(sizes))


def training_memory(
    parameters: int, cost: Cost, batch_size: int, optimizer: str, half_precision: bool
) -> float:
    """Bytes, without the work space of convolutions."""
    per_parameter = WEIGHTS + GRADIENTS + AVERAGE + MOMENTS[optimizer]
    return per_parameter * parameters + batch_size * cost.activations / (2 if half_precision else 1)
