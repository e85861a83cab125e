"""Tests of unet.py: parts against their definitions, the whole against what a user relies on."""

import dataclasses
import inspect

import pytest
import torch

from network import Condition
from tests.networks import randomised, tiny_unet
from unet import BasicTransformerBlock, UNet, UNetConfig, WindowTransformer


def inputs(height=32, width=32, batch=2, scale=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(batch, 3, height, width, generator=generator)
    upscaled = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    low_res = torch.rand(batch, 3, height // scale, width // scale, generator=generator) * 2 - 1
    return noisy, torch.arange(batch) * 100, Condition(upscaled, low_res)


def output(unet, noisy, t, condition):
    return unet(noisy, t, unet.encode_context(condition)[0])


def randomised_block(**settings):
    return randomised(BasicTransformerBlock(12, head_dim=4, **settings))


def test_the_signature_is_the_one_listing_and_begins_as_the_mission_says():
    shown = inspect.signature(UNet).parameters
    assert [*shown][:5] == ["in_channels", "out_channels", "base_dim", "dim_mults", "context_dim"]
    assert {name: one.default for name, one in shown.items()} == vars(UNetConfig())
    assert UNet(3, 3, 8, (1, 2), context_dim=16).config == UNetConfig(
        base_dim=8, dim_mults=(1, 2), context_dim=16
    )
    with pytest.raises(TypeError, match="depth"):
        UNet(depth=3)


@pytest.mark.parametrize("predictor_blocks", [0, 2])
def test_a_new_network_predicts_zero(predictor_blocks):
    unet = UNet(base_dim=8, dim_mults=(1, 2), context_dim=16, predictor_blocks=predictor_blocks)
    noisy, t, condition = inputs()
    context, mean = unet.encode_context(condition)
    assert not unet(noisy, t, context).any()
    expected = torch.zeros_like(noisy) if predictor_blocks else None
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("norm", ["group", "pixel"])
@pytest.mark.parametrize("size", [(32, 32), (30, 17), (1, 1)])
def test_any_size_goes_in_and_comes_out(patch_size, norm, size):
    noisy, t, condition = inputs(*size, scale=1)
    unet = tiny_unet(patch_size=patch_size, norm=norm, dim_mults=(1, 2, 2))
    assert output(unet, noisy, t, condition).shape == noisy.shape


@pytest.mark.parametrize(
    ("conditioning", "sees_upscaled", "sees_low_res"),
    [("concat", True, False), ("cross_attention", False, True), ("both", True, True)],
)
def test_each_conditioning_uses_what_it_says(conditioning, sees_upscaled, sees_low_res):
    noisy, t, condition = inputs()
    unet = tiny_unet(conditioning=conditioning)
    before = output(unet, noisy, t, condition)
    other_upscaled = output(unet, noisy, t, condition._replace(upscaled=-condition.upscaled))
    other_low_res = output(unet, noisy, t, condition._replace(low_res=-condition.low_res))
    assert not torch.allclose(before, output(unet, noisy, t + 500, condition))
    assert torch.allclose(before, other_upscaled) != sees_upscaled
    assert torch.allclose(before, other_low_res) != sees_low_res


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["none", "concat", "both"])
@pytest.mark.parametrize("size", [(32, 32), (30, 17), (1, 1)])
def test_the_refiner_starts_from_the_predictor_s_features(conditioning, size):
    noisy, t, condition = inputs(*size, scale=1)
    unet = tiny_unet(predictor_blocks=2, predictor_dim=12, conditioning=conditioning)
    context, mean = unet.encode_context(condition)
    assert mean.shape == noisy.shape
    other = output(unet, noisy, t, condition._replace(upscaled=-condition.upscaled))
    assert not torch.allclose(unet(noisy, t, context), other)
    unet.predictor.to_features.requires_grad_(False)
    unet(noisy, t, context).sum().backward()
    assert unet.predictor.stem.weight.grad.abs().sum() > 0


def test_the_mean_of_a_window_is_that_of_the_whole_image_beyond_its_reach():
    _, _, condition = inputs(64, 64, batch=1)
    unet = tiny_unet(predictor_blocks=2, patch_size=2)
    whole = unet.encode_context(condition)[1]
    window = unet.encode_context(Condition(condition.upscaled[..., 16:, 16:], condition.low_res))[1]
    reach = unet.mean_reach
    assert reach == 12
    torch.testing.assert_close(window[..., reach:, reach:], whole[..., 16 + reach :, 16 + reach :])
    assert not torch.allclose(window, whole[..., 16:, 16:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("levels", "count"), [((-1,), 3), ((), 0), ((0,), 2), ((0, 1), 5), ((1, -1), 3), ((0, 1, 2), 7)]
)
def test_attention_is_at_the_levels_that_were_asked_for(levels, count):
    noisy, t, condition = inputs()
    mults = (1, 2, 2) if 2 in levels else (1, 2)
    unet = tiny_unet(attention_levels=levels, dim_mults=mults, conditioning="both")
    assert len(unet.transformers) == count
    other = output(unet, noisy, t, condition._replace(low_res=-condition.low_res))
    assert torch.allclose(output(unet, noisy, t, condition), other) == (count == 0)


@pytest.mark.parametrize(
    ("conditioning", "tokens", "low_res", "message"),
    [
        ("both", None, None, "low-resolution"),
        ("cross_attention", torch.zeros(2, 5, 7), None, r"\(B, N, 16\)"),
        ("concat", torch.zeros(2, 5, 16), None, "'concat'"),
    ],
)
def test_a_missing_or_wrong_condition_is_an_error_not_a_guess(conditioning, tokens, low_res, message):
    condition = Condition(torch.zeros(2, 3, 32, 32), low_res, tokens)
    with pytest.raises(ValueError, match=message):
        tiny_unet(conditioning=conditioning).encode_context(condition)


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_images_of_a_batch_do_not_mix(size):
    noisy, t, condition = inputs(*size)
    unet = tiny_unet()
    alone = output(unet, noisy[1:], t[1:], Condition(condition.upscaled[1:], condition.low_res[1:]))
    torch.testing.assert_close(output(unet, noisy, t, condition)[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("predictor_blocks", [0, 2])
def test_every_weight_learns(predictor_blocks):
    noisy, t, condition = inputs(64, 64)
    unet = tiny_unet(predictor_blocks=predictor_blocks)
    context, mean = unet.encode_context(condition)
    (unet(noisy, t, context).square().mean() + (0 if mean is None else mean.square().mean())).backward()
    silent = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_forgetting_activations_changes_memory_and_no_gradient():
    noisy, t, condition = inputs(16, 16)
    kept, gradients, unet = [], [], tiny_unet(predictor_blocks=2)
    for forget in (False, True):
        seen = []
        unet.zero_grad()
        unet.checkpoint_activations = forget
        with torch.autograd.graph.saved_tensors_hooks(lambda x, seen=seen: seen.append(x) or x, lambda x: x):
            predicted = output(unet, noisy, t, condition)
        predicted.square().mean().backward()
        kept.append(sum(tensor.numel() for tensor in seen))
        gradients.append([parameter.grad for parameter in unet.parameters()])
    assert kept[1] < 0.7 * kept[0]
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------------------------- attention


def test_a_new_transformer_block_only_feeds_forward():
    block, x = BasicTransformerBlock(12, 6, head_dim=4), torch.randn(2, 7, 12)
    torch.testing.assert_close(block(x, torch.randn(2, 3, 6)), x + block.feed_forward(block.norm3(x)))


def test_a_context_is_refused_where_there_is_no_cross_attention():
    with pytest.raises(ValueError, match="context_dim"):
        randomised_block()(torch.randn(2, 7, 12), torch.randn(2, 3, 6))


def test_self_attention_is_the_formula_of_the_paper():
    attention = randomised_block().self_attention
    x = torch.randn(1, 5, 12)
    query, key, value = attention.to_query(x), *attention.to_key_value(x).chunk(2, dim=-1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (query[..., part] @ key[..., part].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ value[..., part])
    torch.testing.assert_close(attention(x, x), attention.out(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize(
    ("shifted", "pixel", "rows", "columns"),
    [(False, (1, 6), slice(0, 4), slice(4, 8)), (True, (3, 3), slice(2, 6), slice(2, 6))],
)
def test_windows_are_attended_to_separately_and_shifted_ones_straddle_the_seams(
    shifted, pixel, rows, columns
):
    transformer = WindowTransformer(randomised_block(), window=4, shifted=shifted)
    x = torch.randn(1, 12, 8, 12)
    changed = x.clone()
    changed[:, :, *pixel] = torch.randn(12)
    difference = (transformer(x) - transformer(changed)).abs().amax(1)[0] > 1e-6
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[rows, columns] = True
    assert torch.equal(difference, expected)


@pytest.mark.parametrize("window", [0, 8])
def test_one_window_over_everything_is_the_plain_block(window):
    block, x, context = randomised_block(context_dim=6), torch.randn(2, 12, 5, 6), torch.randn(2, 3, 6)
    expected = block(x.flatten(2).transpose(1, 2), context).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(WindowTransformer(block, window, shifted=True)(x, context), expected)


# --------------------------------------------------------------------------------------------- configuration


def test_a_network_is_rebuilt_from_a_record_also_of_retired_options():
    config = UNetConfig(base_dim=48, dim_mults=(1, 3), patch_size=4, norm="group")
    assert UNet.from_config(UNetConfig.from_dict(config.to_dict())).config == config
    assert UNetConfig.from_dict({**config.to_dict(), "scales": [], "context_blocks": 0}) == config
    for unknown in ({"depth": 3}, {"context_blocks": 2}, {"scales": [2.0, 4.0]}):
        with pytest.raises(ValueError, match=next(iter(unknown))):
            UNetConfig.from_dict({**config.to_dict(), **unknown})


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_dim", 30), ("dim_mults", (1, 0)), ("patch_size", 3), ("attention_levels", (3,))],
)
def test_an_impossible_configuration_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(UNetConfig(), **{field: value})
