"""What a training step costs, against arithmetic."""

import torch
from torch import nn

from engine.cost import Cost, count_cost, training_memory


def test_operations_and_activations_are_those_of_arithmetic():
    """Two convolutions of 8 channels on 16 x 16 pixels, with a ReLU between."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        image = torch.zeros(1, 8, 16, 16)
    cost = count_cost(network, lambda: network(image).sum())
    convolution, plane = 2 * 8 * 8 * 9 * 16 * 16, 4 * 8 * 16 * 16
    assert cost.flops == 5 * convolution  # forward 2, backward 3: the image needs no gradient
    assert cost.activations == 2 * plane  # the image, and what the ReLU gave


def test_memory_is_weights_gradients_average_moments_and_activations():
    cost = Cost(0, 1000)
    assert training_memory(10, cost, 3, "adamw", half_precision=False) == 20 * 10 + 3 * 1000
    assert training_memory(10, cost, 3, "adamw8bit", half_precision=True) == 14 * 10 + 3 * 500
