"""Properties that hold for every input: of the resize, and of the order of the data."""

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bicubic import downscale_image, resize, upscale_image
from training import BatchPlan, TrainingConfig

lengths = st.integers(1, 48)
scales = st.one_of(
    st.sampled_from([1 / 8, 1 / 3, 0.4, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0]), st.floats(0.06, 9)
)
borders = st.sampled_from(["mirror", "replicate"])
dtypes = st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
seeds = st.integers(0, 2**31)


def random_image(shape, seed, dtype=torch.float64):
    values = 256 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.clamp(max=255).to(dtype)


def cubic(x):
    """Keys (1981), with a = -1/2."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def definition(line, scale, out_size, border):
    """One direction of MATLAB's ``imresize``, pixel by pixel."""
    result = np.zeros(out_size)
    stretch = min(scale, 1)
    mirrored = [*range(len(line)), *reversed(range(len(line)))]
    for i in range(out_size):
        center = (i + 0.5) / scale - 0.5
        near = range(math.floor(center - 2 / stretch) - 1, math.ceil(center + 2 / stretch) + 2)
        weights = [cubic((center - j) * stretch) for j in near]
        if border == "replicate":
            taps = [line[min(max(j, 0), len(line) - 1)] for j in near]
        else:
            taps = [line[mirrored[j % len(mirrored)]] for j in near]
        result[i] = np.dot(weights, taps) / sum(weights)
    return result


# Resize


@pytest.mark.slow
@given(lengths, scales, borders, seeds)
def test_resize_equals_its_definition_in_both_directions(length, scale, border, seed):
    line = random_image((length,), seed)
    rows = resize(line[:, None], scale=scale, border=border)[:, 0]
    columns = resize(line[None], scale=scale, border=border)[0]
    expected = definition(line.numpy(), scale, len(rows), border)
    np.testing.assert_allclose(rows.numpy(), expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(columns.numpy(), expected, rtol=0, atol=1e-11)


@given(st.tuples(lengths, lengths), st.integers(1, 16), st.integers(1, 16), borders, dtypes)
def test_a_resized_image_has_ceil_of_scale_times_size_pixels_of_its_dtype(size, above, below, border, dtype):
    resized = resize(random_image((2, *size), 0, dtype), scale=above / below, border=border)
    assert list(resized.shape[1:]) == [math.ceil(Fraction(above * length, below)) for length in size]
    assert resized.dtype == dtype


@given(st.tuples(lengths, lengths), st.tuples(lengths, lengths), borders, dtypes, st.integers(0, 255))
def test_the_weights_of_every_pixel_sum_to_one(size, new_size, border, dtype, value):
    image = torch.full((1, *size), value, dtype=dtype)
    resized = resize(image, size=new_size, border=border)
    assert resized.shape == (1, *new_size)
    tolerance = 0 if dtype == torch.uint8 else 1e-12 * value
    assert (resized.double() - image.double()[0, 0, 0]).abs().max() <= tolerance


@given(st.tuples(lengths, lengths), scales, borders, seeds, st.floats(-3, 3))
def test_resize_is_linear(size, scale, border, seed, factor):
    one, other = random_image(size, seed), random_image(size, seed + 1)
    together = resize(factor * one + other, scale=scale, border=border)
    apart = factor * resize(one, scale=scale, border=border) + resize(other, scale=scale, border=border)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-9)


@given(st.tuples(lengths, lengths), scales, borders, seeds)
def test_uint8_is_the_exact_result_rounded_half_up_and_clamped(size, scale, border, seed):
    image = random_image(size, seed, torch.uint8)
    exact = resize(image.double(), scale=scale, border=border)
    expected = (exact + 0.5).floor().clamp(0, 255).to(torch.uint8)
    assert torch.equal(resize(image, scale=scale, border=border), expected)


@given(st.integers(2, 4), st.integers(0, 20), st.integers(1, 20), st.integers(0, 20), seeds)
def test_a_window_s_upscale_is_the_crop_of_the_whole_s(factor, before, inside, after, seed):
    """Two pixels around a window are all that its upscaled pixels depend on."""
    whole = random_image((3, before + inside + after + 4), seed)
    first = before + 2
    window = whole[:, first - 2 : first + inside + 2]
    expected = upscale_image(whole, factor)[:, factor * first : factor * (first + inside)]
    torch.testing.assert_close(
        upscale_image(window, factor)[:, 2 * factor : -2 * factor], expected, rtol=0, atol=1e-10
    )


@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 8))
def test_up_and_down_by_a_whole_number_gives_the_size_back(height, width, factor):
    image = random_image((height, width), 0)
    assert downscale_image(upscale_image(image, factor), factor).shape == image.shape


# The order of the data


@st.composite
def plans(draw):
    sizes = {"batch_size": st.integers(1, 9), "accumulation_steps": st.integers(1, 5)}
    config = draw(st.builds(TrainingConfig, **sizes, seed=st.integers(0, 99)))
    return BatchPlan(draw(st.integers(1, 200)), config, draw(st.integers(1, 7)))


@given(plans(), st.integers(0, 3))
def test_an_epoch_uses_every_sample_once_however_many_processes_share_it(plan, epoch):
    used = Counter()
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        for rank in range(plan.world_size):
            used.update(pair for part in plan.micro_batches(step, rank) for pair in part.pairs)
    assert used == Counter((epoch, index) for index in range(plan.length))


@given(plans(), st.integers(0, 50))
def test_every_sample_of_a_step_weighs_the_same_however_many_processes_share_it(plan, step):
    passes = plan.config.accumulation_steps * plan.world_size
    alone = BatchPlan(plan.length, replace(plan.config, accumulation_steps=passes))
    shared = [part for rank in range(plan.world_size) for part in plan.micro_batches(step, rank)]
    assert sorted(shared) == alone.micro_batches(step)
    assert sum(part.weight * len(part.pairs) for part in shared) == pytest.approx(1)
    assert all(1 <= len(part.pairs) <= plan.config.batch_size for part in shared)
